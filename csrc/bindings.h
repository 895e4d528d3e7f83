// What all of the module's functions take, as Python gives it.
#pragma once

#include "cpu/kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace m3em {

// The sizes (N,C,H,W) of a tensor.
struct Shape {
    int64_t at[4];
    int64_t operator[](int i) const { return at[i]; }
};

// A tensor comes as (address, dtype, strides), one that is not wanted or not there as None. Read with Python's own
// functions: pybind11's casts of the same would be a twentieth of a tiny call.
inline Tensor tensor(const py::object &from) {
    Tensor t;
    if (from.is_none())
        return t;
    PyObject *const parts = from.ptr();
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != 3 || !PyTuple_Check(PyTuple_GET_ITEM(parts, 2)))
        throw py::type_error("a tensor is given as (address, dtype, strides)");
    t.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(parts, 0));
    t.dtype = static_cast<Dtype>(PyLong_AsLong(PyTuple_GET_ITEM(parts, 1)));
    PyObject *const strides = PyTuple_GET_ITEM(parts, 2);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(strides) && i < 4; ++i)
        t.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    if (PyErr_Occurred())
        throw py::error_already_set();
    return t;
}

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
