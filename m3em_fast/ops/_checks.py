"""Argument checks shared by the ops. Every message names the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from m3em_fast.backends import native

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(op: str, name: str, value: Any, ndim: int, shape: str) -> None:
    """``value`` is a floating-point, strided tensor of ``ndim`` dimensions, none but the first of size 0."""
    plain = type(value) is Tensor or type(value) is Parameter
    if plain and value.dim() == ndim and value.numel() and value.dtype in FLOATS and value.layout is torch.strided:
        return  # nearly every call; told in the fewest questions
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float64, float32, float16 or bfloat16, got {name_of(value.dtype)}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.dim() != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions {shape}, got shape {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{op}: {name} {shape} may be empty in its first dimension only, got {tuple(value.shape)}")


def same_device(op: str, name: str, value: Tensor, x_name: str, x: Tensor) -> None:
    if not (value.is_cpu and x.is_cpu) and value.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of {x_name} ({x.device}), got {value.device}")


def beside(op: str, name: str, value: Tensor, x_name: str, x: Tensor) -> None:
    """``value`` is on x's device and has x's dtype, or is float32 beside a half x."""
    same_device(op, name, value, x_name, x)
    if value.dtype is x.dtype or (value.dtype == torch.float32 and x.dtype in HALVES):
        return
    wanted = name_of(x.dtype) + (" or float32" if x.dtype in HALVES else "")
    raise TypeError(f"{op}: {name} must be {wanted} beside {x_name} in {name_of(x.dtype)}, got {name_of(value.dtype)}")


def tensor_beside(op: str, name: str, value: Any, ndim: int, shape: str, x: Tensor) -> None:
    """``tensor`` and ``beside`` of one value, with x checked before."""
    plain = type(value) is Tensor or type(value) is Parameter
    alike = plain and value.dtype is x.dtype and value.is_cpu and x.is_cpu
    if alike and value.dim() == ndim and value.numel() and value.layout is torch.strided:
        return  # nearly every one
    tensor(op, name, value, ndim, shape)
    beside(op, name, value, "x", x)


def gates(op: str, value: Any, x: Tensor) -> tuple[Tensor, ...]:
    """A sequence of at least one gate (N,C) for x (N,C,H,W), as a tuple."""
    if native is not None and not torch.compiler.is_compiling() and native.gates_fit(value, x):
        return tuple(value)  # nearly every call; the questions below find out why not
    plain = type(value) is tuple or type(value) is list
    if not plain and (isinstance(value, Tensor) or not isinstance(value, Sequence)):
        raise TypeError(f"{op}: gates must be a sequence of tensors (N,C), got {type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: gates must hold at least one tensor (N,C), got none")
    n, c, _, _ = x.shape
    wanted = (n, c)
    for i, gate in enumerate(value):
        name = f"gates[{i}]"
        tensor(op, name, gate, 2, "(N,C)")
        if gate.shape != wanted:
            raise ValueError(f"{op}: {name} must be (N,C) = {wanted} like x, got {tuple(gate.shape)}")
        beside(op, name, gate, "x", x)
    return tuple(value)


def consensus(op: str, value: Any, x: Tensor) -> None:
    """A consensus map (N,1,H,W) for x (N,C,H,W)."""
    tensor_beside(op, "cmap", value, 4, "(N,1,H,W)", x)
    n, _, h, w = x.shape
    wanted = (n, 1, h, w)
    if value.shape != wanted:
        raise ValueError(f"{op}: cmap must be (N,1,H,W) = {wanted} for this x, got {tuple(value.shape)}")
