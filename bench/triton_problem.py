"""The ops for which bench/triton_count.py runs Triton kernels: arguments, and what should come out, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Size
from bench.cuda_plan import PAPER
from m3em_fast.triton import _table

__all__ = ["SAMPLES", "Problem"]

SAMPLES = 3  # programs are alike
EPS = 1e-8


class Problem:
    """An op at a size of the maps, on the CPU, with all that its kernels should write."""

    def __init__(self, op: str, mode: str, dtype: torch.dtype, size: Size) -> None:
        self.op, self.mode, self.dtype, self.positions = op, mode, dtype, size.h * size.w
        self.channels = channels = size.d if op == "consensus_map" else size.c
        name = op if mode == "forward" else _table.backward_of(op)
        self._key = (name, dtype, channels, self.positions)
        torch.manual_seed(1)
        make = {"channel_gate": self._gate, "consensus_map": self._map, "consensus_pool": self._pool}[op]
        self.filled: dict[str, Tensor] = {}  # by its name what another kernel would have written
        # What launches, given the op's module; and by the names of the kernel's arguments what should be in them.
        self.call: Callable[[Any], None]
        self.wanted: Callable[[Tensor], dict[str, Tensor]]
        # What has the same row of the table: calls that are compiled only.
        self.others: list[Callable[[Any], None]] = []
        make(mode, channels, size.h, size.w)

    @property
    def row(self) -> str:
        """Of the table."""
        return _table.row_of(*self._key)

    def default(self, capability: int) -> dict[str, int]:
        """The computed sizes."""
        return _table.default(*self._key, capability)

    def large(self, t: Tensor) -> bool:
        """Whether it is one of the maps."""
        return t.dim() == 4 and (t.shape[1] > 1 or self.channels == 1)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape).to(self.dtype)

    def _gate(self, mode: str, c: int, h: int, w: int) -> None:
        many = PAPER["channel_gate"].more
        x, out = self._random(c, h, w), self._random(many * c, h, w)
        gates = [self._random(c) for _ in range(many)]
        if mode == "forward":
            self.call = lambda module: module.forward(x, gates, out)
            copies = [x.double() * gate.double()[:, :, None, None] for gate in gates]
            self.wanted = lambda _: {"out": torch.cat(copies, 1)}
            return
        grads = [torch.empty_like(x), *map(torch.empty_like, gates)]
        self.call = lambda module: module.backward(x, gates, out, grads)
        parts = out.double().split(c, 1)
        of_x = sum(part * gate.double()[:, :, None, None] for part, gate in zip(parts, gates, strict=True))
        of_gates = {f"grad_gates.{g}": (part * x.double()).sum((2, 3)) for g, part in enumerate(parts)}
        self.wanted = lambda _: {"grad_x": of_x, **of_gates}

    def _pool(self, mode: str, c: int, h: int, w: int) -> None:
        x, out, cmap = self._random(c, h, w), self._random(c), self._random(1, h, w)
        if mode == "forward":
            self.call = lambda module: module.forward(x, cmap, out)
            self.wanted = lambda _: {"out": ((1 + cmap.double()) * x.double()).mean((2, 3))}
            return
        self.call = lambda module: module.backward(x, cmap, out, torch.empty_like(x), torch.empty_like(cmap))
        given = out.double()[:, :, None, None] / (h * w)

        def wanted(partial: Tensor) -> dict[str, Tensor]:
            chunks = partial.numel() // (SAMPLES * h * w)
            return {"grad_x": given * (1 + cmap.double()), "partial": _sums(given * x.double(), chunks)}

        self.wanted = wanted

    def _map(self, mode: str, d: int, h: int, w: int) -> None:
        scales = PAPER["consensus_map"].more
        a, b, grad = self._random(d, h, w), self._random(d, h, w), self._random(1, h, w)
        wide = [t.double().requires_grad_() for t in (a, b)]
        shapes = [(max(1, h >> k), max(1, w >> k)) for k in range(scales)]
        pools = [[F.adaptive_avg_pool2d(t, shape) for t in wide] for shape in shapes]
        options, centered = (scales, False, EPS, self.dtype), (scales, True, EPS, self.dtype)
        last = tuple(t.contiguous(memory_format=torch.channels_last) for t in (a, b))
        cells = sum(rows * columns for rows, columns in shapes)
        if mode == "forward":
            self.others = [
                lambda module: module.forward(centered, (a, b), False),
                lambda module: module.forward(options, last, False),
            ]

            def sums(partial: Tensor) -> dict[str, Tensor]:
                chunks = partial.numel() // (SAMPLES * 3 * cells)
                products = [(p * q, p * p, q * q) for p, q in ([t.detach() for t in pair] for pair in pools)]
                flat = [torch.cat([each[i].flatten(2) for each in products], 2) for i in range(3)]
                return {"partial": torch.stack([_sums(t, chunks) for t in flat], 2)}

            self.call = lambda module: module.forward(options, (a, b), False)
            self.wanted = sums
            return
        cosines = [F.cosine_similarity(p, q, 1, EPS)[:, None] for p, q in pools]
        up = [F.interpolate(t, (h, w), mode="bilinear", align_corners=False) for t in cosines]
        arriving = torch.autograd.grad(torch.stack(up).sum(0), [*cosines, *wide], grad.double(), retain_graph=True)
        stats, factors = [], []
        for (p, q), cosine, own, (rows, columns) in zip(pools, cosines, arriving[:scales], shapes, strict=True):
            norms = [t.detach().norm(dim=1, keepdim=True) for t in (p, q)]
            three = [1 / (norms[0] * norms[1]), *(cosine.detach() / norm**2 for norm in norms)]
            area = torch.outer(_lengths(h, rows), _lengths(w, columns))
            stats.append(torch.cat(three, 1).flatten(2))
            factors.append((torch.cat(three, 1) * own / area).flatten(2))
        saved = torch.cat(stats, 2).flatten(1).float()
        self.filled = {"factors": torch.cat(factors, 2).flatten(1).float()}
        self.call = lambda module: module.backward(options, grad, (a, b), [saved], (True, True))
        self.wanted = lambda _: {"grad_a": arriving[-2], "grad_b": arriving[-1]}
        of_center = saved.new_empty((SAMPLES, 3 * cells + 2 * h * w))
        self.others = [
            lambda module: module.backward(centered, grad, (a, b), [of_center], (True, True)),
            lambda module: module.backward(options, grad, last, [saved], (True, True)),
        ]


def _sums(t: Tensor, chunks: int) -> Tensor:
    """Over the channels of every chunk, which has a power of two of them, the last one maybe fewer."""
    n, c = t.shape[:2]
    padded = t.new_zeros(n, chunks * _table.power_of_two(-(-c // chunks)), t[0, 0].numel())
    padded[:, :c] = t.flatten(2)
    return padded.unflatten(1, (chunks, -1)).sum(2)


def _lengths(length: int, cells: int) -> Tensor:
    """Of the windows of the cells in a line."""
    return torch.tensor([-(-(i + 1) * length // cells) - i * length // cells for i in range(cells)]).double()
