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
// data_ptr(), stride() and a dtype that Python has told of (`dtypes`). A tuple (address, dtype, strides) does as well.
Tensor tensor(const py::object &from);
std::vector<Tensor> tensors(const py::sequence &from);

inline void *address(uintptr_t at) { return reinterpret_cast<void *>(at); }

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
