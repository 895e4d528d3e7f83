// What all of the module's functions take, as Python gives it.
#pragma once

#include "cpu/kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace py = pybind11;

namespace m3em {

// The sizes (N,C,H,W) of a tensor.
struct Shape {
    int64_t at[4];
    int64_t operator[](int i) const { return at[i]; }
};

// A tensor, one that is not wanted or not there as None. Nothing of torch is needed to read it: anything does that has
// data_ptr(), stride() and a dtype that Python has told of (`dtypes`).
Tensor tensor(const py::object &from);
std::vector<Tensor> tensors(const py::sequence &from);

inline void *address(uintptr_t at) { return reinterpret_cast<void *>(at); }

// What both passes of an op are given, on the CPU and on a card.
inline ChannelGate channel_gate_of(const py::object &x, const Shape &shape, int num_gates) {
    ChannelGate o;
    o.x = tensor(x);
    o.n = shape[0], o.c = shape[1], o.h = shape[2], o.w = shape[3];
    o.num_gates = num_gates;
    return o;
}

inline ConsensusMap consensus_map_of(const py::object &a, const py::object &b, uintptr_t stats, const Shape &shape,
                                     int num_scales, bool center, double eps) {
    ConsensusMap m;
    m.a = tensor(a);
    m.b = tensor(b);
    m.stats = address(stats);
    m.n = shape[0], m.d = shape[1], m.h = shape[2], m.w = shape[3];
    m.num_scales = num_scales;
    m.center = center;
    m.eps = eps;
    return m;
}

inline ConsensusPool consensus_pool_of(const py::object &x, const py::object &cmap, const Shape &shape) {
    ConsensusPool o;
    o.x = tensor(x);
    o.cmap = tensor(cmap);
    o.n = shape[0], o.c = shape[1], o.h = shape[2], o.w = shape[3];
    return o;
}

void bind_cuda(py::module_ &module); // cuda/bindings.cpp

} // namespace m3em

namespace pybind11 {
namespace detail {

template <>
struct type_caster<m3em::Shape> {
    PYBIND11_TYPE_CASTER(m3em::Shape, const_name("tuple[int, int, int, int]"));
    bool load(handle from, bool) {
        if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != 4)
            return false;
        for (int i = 0; i < 4; ++i)
            value.at[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), i));
        if (!PyErr_Occurred())
            return true;
        PyErr_Clear();
        return false;
    }
};

} // namespace detail
} // namespace pybind11
