"""Which clips form a step: shuffled source and target batches side by side, as TA3N pairs them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def _check(num_source: int, num_target: int | None, batch_source: int, batch_target: int) -> None:
    facts = {"num_source": num_source, "batch_source": batch_source}
    if num_target is not None:
        facts |= {"num_target": num_target, "batch_target": batch_target}
    for name, value in facts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def num_batches(num_source: int, num_target: int | None, batch_source: int, batch_target: int) -> int:
    """Number of steps in one pass of :func:`paired_batches` with the same arguments."""
    _check(num_source, num_target, batch_source, batch_target)
    source = -(-num_source // batch_source)
    return source if num_target is None else min(source, -(-num_target // batch_target))


def shard(count: int, part: int, parts: int) -> slice:
    """Which of ``count`` things in a row belong to one of ``parts`` processes.

    The shares of all are the whole, in order and without overlap; no two differ by more than one. Where there are fewer
    things than processes, some are empty.
    """
    return slice(count * part // parts, count * (part + 1) // parts)


def paired_batches(
    num_source: int,
    num_target: int | None,
    batch_source: int,
    batch_target: int,
    *,
    seed: int,
    epoch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield (source, target) index arrays, int64, for one epoch.

    Both domains are shuffled, each clip at most once an epoch, by ``seed`` and ``epoch`` alone, so that a resumed run
    draws what the interrupted one would have drawn. A last batch may be smaller. The pass ends with the shorter of the
    two, as ``zip`` does in TA3N's public code.

    Args:
        num_source: clips of the source.
        num_target: clips of the target; None where a method uses none, and then target is None in every pair.
        batch_source: source clips per step.
        batch_target: target clips per step.
        seed: not negative.
        epoch: not negative.

    Raises:
        ValueError: a number is below 1, or seed or epoch below 0.
    """
    steps = num_batches(num_source, num_target, batch_source, batch_target)
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got {seed} and {epoch}.")
    return _pairs(steps, num_source, num_target, batch_source, batch_target, seed, epoch)


def _pairs(
    steps: int, num_source: int, num_target: int | None, batch_source: int, batch_target: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    # A generator of its own for each domain: the source's order is then the same with and without a target.
    source = np.random.default_rng([seed, epoch, 0]).permutation(num_source)
    target = None if num_target is None else np.random.default_rng([seed, epoch, 1]).permutation(num_target)
    for step in range(steps):
        first = source[step * batch_source : (step + 1) * batch_source]
        yield first, None if target is None else target[step * batch_target : (step + 1) * batch_target]
