"""The next batches are read while the present one is used, in the order and with the values of reading one by one.

    reader = BatchReader([source, target], model.modalities, frames=5)
    with Prefetch(paired_batches(...), reader) as batches:
        for (source_clips, target_clips), features in batches:
            ...

Nothing here draws random numbers. Requests are taken from their iterator by the thread that asks for batches, in
order, ``depth`` of them ahead; only reading happens elsewhere. A loop that is to begin at a later step takes the
requests from there on: ``itertools.islice(paired_batches(...), step, None)``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch

from .store import FeatureStore, fresh

__all__ = ["Batch", "BatchReader", "Prefetch"]

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")


class BatchReader:
    """Reads clips of several stores into one tensor a modality, those of the first store first.

    Args:
        stores: whose modalities look alike.
        modalities: names to read.
        frames: how many of the stored frames, evenly spread; see :meth:`FeatureStore.read`.
        pin_memory: read into page-locked memory, from which a copy to a card does not wait; without a card ignored.

    Raises:
        ValueError: a store has not one of the modalities, or in another shape than the first store.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], modalities: Iterable[str], frames: int, *, pin_memory: bool = False
    ) -> None:
        self.stores, self.modalities, self.frames = list(stores), list(modalities), frames
        self.pin_memory = pin_memory and torch.cuda.is_available()
        #: Whether bytes are made float16 on the way, which is worth a second thread (docs/performance.md).
        self.widens = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        for store in self.stores:
            for name in self.modalities:
                if name not in store.modalities:
                    raise ValueError(f"{store.path} has no modality {name!r}.")
                shape = store.modalities[name].shape[1:]
                self.widens |= store.modalities[name].dtype == "uint8"
                if self._shapes.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{store.path} has {name} in {shape} a frame, {self.stores[0].path} in {self._shapes[name]}."
                    )

    def __call__(self, indices: Sequence[np.ndarray | None], room: Batch | None = None) -> Batch:
        """Read.

        Args:
            indices: for each store positions (B,) of clips in it, or None for none.
            room: tensors of an earlier call, whose memory is used again, and which is enlarged where it is too small.

        Returns:
            name -> float16 (clips of all stores, frames, C, H, W) or (clips, frames, C).

        Raises:
            StoreError: as :meth:`FeatureStore.read`.
        """
        room = {} if room is None else room
        total = sum(len(part) for part in indices if part is not None)
        batch = {name: self._part_of(room, name, total) for name in self.modalities}
        start = 0
        for store, part in zip(self.stores, indices, strict=True):
            if part is not None:
                stop = start + len(part)
                store.read(part, self.modalities, self.frames, out={n: x[start:stop] for n, x in batch.items()})
                start = stop
        return batch

    def _part_of(self, room: Batch, name: str, total: int) -> torch.Tensor:
        if name not in room or len(room[name]) < total:
            shape = (total, self.frames, *self._shapes[name])
            pinned = self.pin_memory
            room[name] = torch.empty(shape, dtype=torch.float16, pin_memory=True) if pinned else fresh(shape)
        return room[name][:total]


class Prefetch(Generic[Item]):
    """An iterator over (request, batch), which is read ahead by threads; a context manager.

    A batch's memory is used again: it holds until the next batch is asked for, or the block ends. What needs it longer
    copies it. Copies to a card with ``non_blocking=True`` must have ended by then, as they have after ``loss.item()``.

    An exception of a request's reading, or of the iterator of requests, comes up where its batch would have, and ends
    the iteration. Leaving the block waits for the reads that have begun, and no others are.

    Args:
        items: the requests.
        read: makes a batch of a request and of the memory that it may use, a dict that is empty at first;
            a :class:`BatchReader`. It has to stand several threads where there are several workers.
        depth: how many batches are read ahead; memory is held for one more. 0 reads when a batch is asked for.
        workers: threads; more than ``depth`` have nothing to do.

    Raises:
        ValueError: a negative depth, or no worker.
    """

    def __init__(
        self, items: Iterable[Item], read: Callable[[Item, Batch], Batch], *, depth: int = 2, workers: int = 2
    ) -> None:
        if depth < 0 or workers < 1:
            raise ValueError(f"depth must be at least 0 and workers at least 1, got {depth} and {workers}.")
        self._items, self._read = iter(items), read
        self._rooms: list[Batch] = [{} for _ in range(depth + 1)]
        self._held: Batch | None = None
        self._ahead: deque[tuple[Item, Batch, Future[Batch]]] = deque()
        self._failed: Exception | None = None
        self._ended = False
        self._pool = ThreadPoolExecutor(min(workers, depth), "m3em-prefetch") if depth else None

    def __iter__(self) -> Iterator[tuple[Item, Batch]]:
        return self

    def __next__(self) -> tuple[Item, Batch]:
        if self._held is not None:
            self._rooms.append(self._held)
            self._held = None
        try:
            self._fill()
            if not self._ahead:
                failed, self._failed = self._failed, None
                raise failed or StopIteration
            item, self._held, future = self._ahead.popleft()
            return item, future.result()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        """Begin to read as far ahead as there is memory."""
        while self._rooms and not self._ended:
            try:
                item = next(self._items)
            except StopIteration:
                self._ended = True
            except Exception as error:
                self._ended, self._failed = True, error
            else:
                room = self._rooms.pop()
                self._ahead.append((item, room, self._start(item, room)))

    def _start(self, item: Item, room: Batch) -> Future[Batch]:
        if self._pool is not None:
            return self._pool.submit(self._read, item, room)
        future: Future[Batch] = Future()
        try:
            future.set_result(self._read(item, room))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """End: what has not begun to be read is not, and the threads are gone afterwards."""
        self._ended = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
