"""Several processes that train as one: shares of a step, sums over all of them, and one sentence when one of them ends.

torchrun starts the processes and says by the environment who they are; without it everything here does nothing.
Gradients go through DistributedDataParallel (NCCL on cards, gloo on the CPU), every other number through gloo.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m3em_fast.data.samplers import shard
from m3em_fast.uda._pulse import Pulse
from m3em_fast.uda.losses import total_loss
from m3em_fast.uda.run import UsageError

__all__ = ["ALONE", "Team", "first", "joined", "launched", "only_one_speaks"]

# Who was started by hand, with these alone, is welcome too.
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STALLED = timedelta(minutes=30)


def launched() -> bool:
    """Whether this is one process of several."""
    return all(name in os.environ for name in _NAMES) and int(os.environ["WORLD_SIZE"]) > 1


def first() -> bool:
    """Whether this process is the one of its run that writes."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def only_one_speaks() -> Iterator[None]:
    """For what every process is told alike: on each machine the first says it, and the others nothing."""
    if not launched() or os.environ["LOCAL_RANK"] == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere:
        before, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), (nowhere, nowhere)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


class Team:
    """The processes of a run, seen by one of them; every method but ``share`` has to be called by all, in one order.

    A process on its own is a team too, and nothing is different for it.

    Attributes:
        rank, size: which of how many processes this is.
    """

    def __init__(self, rank: int = 0, size: int = 1, pulse: Pulse | None = None) -> None:
        self.rank, self.size, self._pulse = rank, size, pulse

    @property
    def first(self) -> bool:
        """Whether this process writes, draws bars and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of ``count`` rows in a row are this process's."""
        return shard(count, self.rank, self.size)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' tensors of this shape and dtype, on the CPU; ``x`` itself, written over."""
        if self.size > 1:
            dist.all_reduce(x)
            self._on()
        return x

    def stacked(self, x: Tensor) -> Tensor:
        """(size, *x.shape): the tensors of all processes, by rank; of one process ``x`` as it is."""
        if self.size == 1:
            return x
        rows = x.new_zeros((self.size, *x.shape))
        rows[self.rank] = x
        return self.sum(rows)

    def told(self, data: bytes | None) -> bytes:
        """What the first process gives, in all of them; the others give None."""
        if self.size > 1:
            # A zero is sent before it, since nothing cannot be sent.
            given = torch.frombuffer(bytearray(b"\0" + (data or b"")), dtype=torch.uint8)
            length = torch.tensor([len(given)])
            dist.broadcast(length, 0)
            if not self.first:
                given = torch.empty(int(length.item()), dtype=torch.uint8)
            dist.broadcast(given, 0)
            self._on()
            data = given[1:].numpy().tobytes()
        assert data is not None
        return data

    def of_first(self, value: Any) -> Any:
        """The first process's value, in all of them; what JSON has, and it comes back as JSON has it."""
        return value if self.size == 1 else json.loads(self.told(json.dumps(value).encode() if self.first else None))

    def step(self, terms: Mapping[str, Tensor], asked: int | None) -> tuple[dict[str, float], int | None]:
        """One step's terms, summed over the processes' shares, and the signal by which any of them is asked to end."""
        values = torch.stack([x.detach() for x in terms.values()]).tolist()
        if self.size == 1:
            return dict(zip(terms, values, strict=True)), asked
        signals = (signal.SIGTERM, signal.SIGINT)
        row = torch.tensor([*values, *(float(asked == number) for number in signals)], dtype=torch.float64)
        *sums, terminated, interrupted = self.sum(row).tolist()
        agreed = signal.SIGTERM if terminated else signal.SIGINT if interrupted else None
        return dict(zip(terms, sums, strict=True)), agreed

    def rows(self, own: Tensor, source: int, clips: int) -> Tensor:
        """(clips,): a number for each clip of the step, from those for this process's rows, source first."""
        if self.size == 1:
            return own
        rows = torch.zeros(clips)
        shares = self.share(source), self.share(clips - source)
        number = len(rows[:source][shares[0]])
        rows[:source][shares[0]], rows[source:][shares[1]] = own[:number], own[number:]
        return self.sum(rows)

    def agree(self, options: Mapping[str, Any], data: Mapping[str, str]) -> None:
        """Refuse what differs between the processes.

        Args:
            options: option -> plain value. Only the path of the data may differ.
            data: split -> fingerprint of its store.

        Raises:
            UsageError: this process has another than the first.
        """
        refused = self._differs(options, data)
        total = self.sum(torch.tensor([float(refused is not None)]))
        if refused is not None:
            raise UsageError(refused)
        if total.item():
            raise _OfAnother

    def _differs(self, options: Mapping[str, Any], data: Mapping[str, str]) -> str | None:
        first = self.of_first([dict(options), dict(data)])
        for name, value in first[0].items():
            if options[name] != value and name != "data":
                flag = f"--{name.replace('_', '-')}"
                return f"{flag} is {options[name]} here and {value} in rank 0; all ranks need the same."
        for split in {**first[1], **data}:
            own, other = data.get(split, "none"), first[1].get(split, "none")
            if own != other:
                sums = f"{own:.12} here and {other:.12} in rank 0"
                return f"the SHA-256 of the manifest of {split} begins with {sums}; all ranks need the same data."
        return None

    def wrap(self, model: nn.Module, features: Mapping[str, Tensor], device: torch.device, seed: int) -> nn.Module:
        """The model for training steps: its backward leaves the sum of all processes' gradients in every process.

        Each of several processes has random numbers of its own from here on.

        Args:
            model: gives an :class:`ActionOutput`.
            features: of no clips, as the model reads them.
            device: where the model is.
            seed: draws those random numbers.
        """
        cards = [torch.cuda.current_device()] if device.type == "cuda" else None
        shared = DistributedDataParallel(model, device_ids=cards)
        shared.register_comm_hook(None, _sum_of_gradients)
        # After its first backward DistributedDataParallel puts gradients into other buckets, which three processes sum
        # in another order: a resumed run would differ from the whole one in the last bit. Here that is one of no clips.
        none = torch.empty(0, dtype=torch.long, device=device)
        out = shared({name: x.to(device) for name, x in features.items()})
        total_loss(out.streams, none, none, of=(1, 1))[0].backward()
        model.zero_grad(set_to_none=True)
        self.seed(seed)
        self._on()
        return shared

    def seed(self, *numbers: int) -> None:
        """Random numbers of this process's own from here on, fixed by ``numbers``."""
        own = np.random.SeedSequence([*numbers, self.size, self.rank])
        torch.manual_seed(int(own.generate_state(1, np.uint64)[0]))

    def _on(self) -> None:
        if self._pulse is not None:
            self._pulse.moved()


ALONE = Team()


def _sum_of_gradients(_, bucket):  # torch refuses annotations that are strings
    # Not the mean that is the default: terms are divided by counts of the whole step already. And not that mean of
    # losses times the number of processes: in float16 they would overflow earlier than one process's.
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


@contextmanager
def joined(device: str, refusals: Sequence[type[Exception]]) -> Iterator[Team]:
    """The team that this process belongs to, for as long as the block lasts.

    Where a process of several ends its block by an exception, or is gone, every process ends within a minute, with one
    sentence on each machine: the exception's where it is one of ``refusals`` (exit code 2) or KeyboardInterrupt.

    Args:
        device: ``"cpu"``, or anything else to use the machine's cards where it has any: the one with the number of the
            process on its machine.
        refusals: exceptions whose message is the sentence.
    """
    if not launched():
        yield ALONE
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # Otherwise the first process that NCCL finds gone ends this one with a stack trace, before anybody could say why.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        pulse = Pulse(rank, size, STALLED.total_seconds())
    except (RuntimeError, ValueError) as error:
        with only_one_speaks():
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"train.py: no other rank could be met at {where} ({str(error).splitlines()[0]}).", file=sys.stderr)
        sys.exit(2)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        backend = "gloo"
        if device != "cpu" and torch.cuda.is_available():
            if local >= (cards := torch.cuda.device_count()):
                started = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
                raise UsageError(
                    f"--nproc-per-node {started}: this machine has {cards} cards; start one process a card."
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        # Longer than the pulse waits, which knows more.
        dist.init_process_group(backend, store=pulse.store(), rank=rank, world_size=size, timeout=2 * STALLED)
        team = Team(rank, size, pulse)
        yield team
        team.sum(torch.zeros(1))
    except BaseException as error:
        os._exit(_ended(pulse, error, tuple(refusals)))  # a group that is no longer whole cannot be left in order
    pulse.stop()
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


class _OfAnother(Exception):
    """Another process knows why the run ends."""


class _Terminated(KeyboardInterrupt):
    signal = signal.SIGTERM


def _terminate(*_: object) -> None:
    raise _Terminated


def _ended(pulse: Pulse, error: BaseException, refusals: tuple[type[Exception], ...]) -> int:
    """Say, once on this machine, why the run ended; the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # torchrun sends them as soon as one process has ended
    lost = False
    if isinstance(error, KeyboardInterrupt):
        said = str(error) or "interrupted; --run with --resume goes on from the last checkpoint."
        code = 128 + getattr(error, "signal", signal.SIGINT)
    elif isinstance(error, refusals):
        said, code = str(error), 2
    else:
        said, code = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}", 1
        # What gloo raises where a process is gone has no type of its own.
        lost = isinstance(error, (_OfAnother, dist.DistError)) or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "onnection"))
        )
    final = pulse.end(None if lost else (said, code))
    if final is None:
        final = f"the connection to another rank broke ({said}); --resume goes on from the last checkpoint.", 2
        pulse.tell(final[0])
    if not lost and code == 1 and final[0].endswith(said):
        traceback.print_exception(error)
    return final[1]
