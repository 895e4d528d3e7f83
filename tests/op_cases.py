"""The calls of the ops that the tests make: random inputs in every dtype and layout, and the comparison to `exact`."""

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

import exact
from m3em_fast import ops

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
SHAPES = ((7, 7), (14, 14), (7, 8), (1, 1), (5, 3), (1, 9), (8, 1))
CHANNELS = (1, 3, 64)
LATENT = {1: 1, 3: 5, 64: 8}  # rows of the weight of a projection, never the number of channels of x but once
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "spread")

# Backends that hold no half result of their own on the way, so that their bound has no term for it.
ROUNDS_ONCE = ("reference", "cpu", "simt", "cuda", "triton")
# But for this op of theirs, which makes a half operand for torch's matrix product.
ROUNDS_OPERANDS = (("gated_projection", "simt"), ("gated_projection", "cuda"), ("gated_projection", "triton"))


@dataclass(frozen=True)
class Call:
    """One way to call one op; its tensors are a flat list in the order of the signature."""

    op: str
    gates: int = 0
    cmap: bool = False
    bias: bool = False
    positive: bool = False  # maps as they are after a ReLU, and for consensus_map two that are nearly the same
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self):
        words = [self.op, f"{self.gates}_gates" if self.gates else "", "cmap" if self.cmap else ""]
        words += ["bias" if self.bias else "", "positive" if self.positive else ""]
        return "-".join([word for word in words if word] + [f"{key}={value}" for key, value in self.options.items()])

    @property
    def names(self):
        if self.op == "consensus_map":
            return ["a", "b"]
        names = ["x"] + [f"gate{g}" for g in range(self.gates)]
        names += ["weight"] if self.op == "gated_projection" else []
        return names + (["bias"] if self.bias else []) + (["cmap"] if self.cmap else [])

    def shapes(self, n, c, h, w, d):
        sizes = {"weight": (d, self.gates * c), "bias": (d,), "cmap": (n, 1, h, w)}
        return [sizes.get(name, (n, c) if name.startswith("gate") else (n, c, h, w)) for name in self.names]

    def _split(self, tensors):
        named = dict(zip(self.names, tensors, strict=True))
        return named, [named[f"gate{g}"] for g in range(self.gates)]

    def __call__(self, *tensors):
        named, gates = self._split(tensors)
        if self.op == "channel_gate":
            return ops.channel_gate(named["x"], *gates)
        if self.op == "consensus_map":
            return ops.consensus_map(named["a"], named["b"], **self.options)
        if self.op == "consensus_pool":
            return ops.consensus_pool(named["x"], *([named["cmap"]] if self.cmap else []))
        if self.op == "gated_projection":
            return ops.gated_projection(named["x"], gates, named["weight"], *([named["bias"]] if self.bias else []))
        return ops.gated_consensus_pool(named["x"], gates, *([named["cmap"]] if self.cmap else []))

    def _exact_options(self, shape):
        scales = self.options.get("num_scales") or min(3, exact.scale_limit(*shape[2:]))
        return scales, self.options.get("center", False), self.options.get("eps", 1e-8)

    def exact(self, tensors):
        """The exact result, as `exact.Exact`."""
        arrays = [exact.array(tensor) for tensor in tensors]
        named, gates = self._split(arrays)
        with np.errstate(all="ignore"):
            if self.op == "channel_gate":
                return exact.channel_gate(named["x"], gates)
            if self.op == "consensus_map":
                return exact.consensus_map(*arrays, *self._exact_options(arrays[0].shape))
            if self.op == "consensus_pool":
                return exact.consensus_pool(*arrays)
            if self.op == "gated_projection":
                return exact.gated_projection(named["x"], gates, named["weight"], named.get("bias"))
            return exact.gated_consensus_pool(named["x"], gates, named.get("cmap"))

    def exact_gradients(self, tensors, grad):
        """The exact gradients, in the order of the tensors."""
        arrays = [exact.array(tensor) for tensor in tensors]
        named, gates = self._split(arrays)
        grad = exact.array(grad).astype(arrays[0].dtype)
        with np.errstate(all="ignore"):
            if self.op == "channel_gate":
                return exact.channel_gate_gradients(named["x"], gates, grad)
            if self.op == "consensus_map":
                return exact.consensus_map_gradients(*arrays, grad, *self._exact_options(arrays[0].shape))
            if self.op == "consensus_pool":
                return exact.consensus_pool_gradients(named["x"], named.get("cmap"), grad)
            if self.op == "gated_projection":
                return exact.gated_projection_gradients(named["x"], gates, named["weight"], named.get("bias"), grad)
            return exact.gated_consensus_pool_gradients(named["x"], gates, named.get("cmap"), grad)

    def result_dtype(self, tensors):
        if self.op == "gated_projection":
            return tensors[self.names.index("weight")].dtype
        if "pool" in self.op and any(tensor.dtype == torch.float32 for tensor in tensors):
            return torch.float32
        return tensors[0].dtype

    def rounded(self, name, dtype, tensors, backend):
        """The half dtype in which a result may be rounded once more on the way (see `exact.bound`), or None."""
        if backend in ROUNDS_ONCE and (self.op, backend) not in ROUNDS_OPERANDS:
            return None
        if self.op == "gated_projection" and name != "bias":
            dtype = tensors[self.names.index("weight")].dtype  # the dtype of the matrix product
        elif self.op != "gated_consensus_pool":
            return None
        return dtype if dtype in HALF else None

    def underflow(self, name, tensors, grad, backend):
        """What the rounding of gated operands may cost where they are no normal numbers of their half dtype: half of
        the smallest one each, times the factor that meets it in the matrix product."""
        weight = tensors[-1 - ("bias" in self.names)]
        if self.rounded(name, weight.dtype, tensors, backend) is None or self.op != "gated_projection":
            return 0.0
        factors = {"out": weight.abs().double().sum(1)[:, None, None]}
        if grad is not None:
            factors["weight"] = grad.abs().double().sum((0, 2, 3))[:, None]
        return exact.smallest_subnormal(weight.dtype) / 2 * exact.array(factors.get(name, torch.zeros(())))


# Every op, with and without its optional arguments. One gate is squeeze-and-excitation, two are Eq. 2-4.
CALLS = (
    Call("channel_gate", gates=1),
    Call("channel_gate", gates=2),
    Call("channel_gate", gates=3),
    Call("consensus_map"),
    Call("consensus_map", positive=True),
    Call("consensus_map", options={"center": True}),
    Call("consensus_pool"),
    Call("consensus_pool", cmap=True),
    Call("gated_projection", gates=1),
    Call("gated_projection", gates=2, bias=True),
    Call("gated_projection", gates=2, positive=True),
    Call("gated_consensus_pool", gates=1),
    Call("gated_consensus_pool", gates=2, cmap=True),
)
# The fullest call of each op, for tests in which the optional arguments make no difference.
FULL_CALLS = (
    Call("channel_gate", gates=2),
    Call("consensus_map"),
    Call("consensus_pool", cmap=True),
    Call("gated_projection", gates=2, bias=True),
    Call("gated_consensus_pool", gates=2, cmap=True),
)


def generator(*key):
    """A random generator that is the same in every run and another one for every key."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def lay_out(values, layout):
    """The same numbers with other strides; `expanded` and `spread` repeat the first ones. What lies between the
    elements of a sliced tensor is NaN, so that whoever reads it shows it."""
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        buffer = values.new_full([2 * size + 1 for size in values.shape], torch.nan)
        view = buffer[tuple(slice(1, None, 2) for _ in values.shape)]
        view.copy_(values)
        return view
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # over the batch
        return values[:1].contiguous().expand(values.shape)
    if layout == "spread":  # over everything that is not batch or channel, or over the last axis
        corner = values[..., :1, :1] if values.dim() == 4 else values[..., :1]
        return corner.contiguous().expand(values.shape)
    return values.contiguous()


def random_tensors(call, n, c, h, w, dtype, companion=None, layouts=None, key=(), d=None):
    """Inputs of a call: `dtype` for the feature maps, `companion` (the same unless given) for everything else."""
    shapes = call.shapes(n, c, h, w, d or LATENT.get(c, 4))
    source = generator(call, n, c, h, w, dtype, companion, *key)
    layouts = layouts or ["contiguous"] * len(shapes)
    tensors = []
    for name, shape, layout in zip(call.names, shapes, layouts, strict=True):
        values = torch.randn(shape, generator=source, dtype=torch.float64)
        if name.startswith("gate"):
            values = values.sigmoid()
        elif name == "cmap":
            values = 1 + values  # a sum of three cosines of which most are positive
        elif name == "weight":
            values = values / shape[1] ** 0.5
        if call.positive:
            values = tensors[0].double() + 0.1 * values if name == "b" else values.abs()
        target = dtype if name in ("x", "a", "b") else companion or dtype
        tensors.append(lay_out(values.to(target), layout))
    return tensors


def random_grad(out, layout="contiguous", key=()):
    source = generator("grad", *out.shape, out.dtype, *key)
    values = torch.randn(out.shape, generator=source, dtype=torch.float64).to(out.dtype)
    return lay_out(values, layout)


def check(backend, call, tensors, grad_layout="contiguous", needs=None, grad=None, may_spread=False):
    """Compares the result of a call and its gradients by the tensors named in `needs` (all of them unless given)."""
    needs = call.names if needs is None else needs
    leaves = [tensor.detach().requires_grad_(name in needs) for name, tensor in zip(call.names, tensors, strict=True)]
    out = call(*leaves)
    accumulation = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    assert out.dtype == call.result_dtype(tensors)
    assert out.requires_grad == bool(needs)
    expected = call.exact(tensors)
    allowed = exact.bound(expected, out.dtype, accumulation, call.rounded("out", out.dtype, tensors, backend))
    allowed = allowed + call.underflow("out", tensors, None, backend)
    exact.assert_close(out, expected.value, allowed, f"{call}", may_spread)
    if not needs:
        return out, []
    grad = random_grad(out, grad_layout, call.names) if grad is None else grad
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad))
    gradients = []
    for name, leaf, expected in zip(call.names, leaves, call.exact_gradients(tensors, grad), strict=True):
        if not leaf.requires_grad:
            continue
        gradient = next(found)
        assert gradient.dtype == leaf.dtype
        allowed = exact.bound(expected, leaf.dtype, accumulation, call.rounded(name, leaf.dtype, tensors, backend))
        allowed = allowed + call.underflow(name, tensors, grad, backend)
        exact.assert_close(gradient, expected.value, allowed, f"gradient of {call} by {name}", may_spread)
        gradients.append(gradient)
    return out, gradients
