// The Python module m3em_fast._C: pointers and sizes in, nothing of torch, so one build serves every torch version.
#include "bindings.h"

#include <string>
#include <vector>

using m3em::Shape;
using m3em::tensor;
using m3em::tensors;

#if !defined(M3EM_VERSION) || !defined(M3EM_FLAGS)
#error "setup.py passes M3EM_VERSION and M3EM_FLAGS"
#endif
#define M3EM_TEXT_OF(x) #x
#define M3EM_TEXT(x) M3EM_TEXT_OF(x)

namespace m3em {
namespace {

PyObject *dtypes = nullptr; // a dictionary: dtype of Python -> Dtype
PyObject *types[2] = {};    // the types of ordinary tensors

void set_types(const py::object &tensor, const py::object &parameter) {
    Py_XSETREF(types[0], tensor.inc_ref().ptr());
    Py_XSETREF(types[1], parameter.inc_ref().ptr());
}

void set_dtypes(const py::dict &numbers) { Py_XSETREF(dtypes, numbers.inc_ref().ptr()); }

py::object got(PyObject *object) {
    if (!object)
        throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

// Whether all of them that are there are ordinary tensors on the CPU, with numbers as they stand in memory.
bool ordinary(const py::tuple &tensors) {
    static PyObject *const is_cpu = PyUnicode_InternFromString("is_cpu"), *const is_neg =
                                                                              PyUnicode_InternFromString("is_neg");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); ++i) {
        PyObject *const x = PyTuple_GET_ITEM(tensors.ptr(), i);
        if (x == Py_None)
            continue;
        PyObject *const type = reinterpret_cast<PyObject *>(Py_TYPE(x));
        if ((type != types[0] && type != types[1]) || got(PyObject_GetAttr(x, is_cpu)).ptr() != Py_True ||
            got(PyObject_CallMethodNoArgs(x, is_neg)).ptr() != Py_False)
            return false;
    }
    return true;
}

// Whether all of a list or tuple are ordinary tensors (N,C) beside x (N,C,H,W), which is on the CPU: of its dtype,
// dense.
bool gates_fit(const py::object &gates, const py::object &x) {
    static PyObject *const is_cpu = PyUnicode_InternFromString("is_cpu"),
                           *const dtype = PyUnicode_InternFromString("dtype"),
                           *const shape = PyUnicode_InternFromString("shape"),
                           *const layout = PyUnicode_InternFromString("layout");
    if ((!PyTuple_CheckExact(gates.ptr()) && !PyList_CheckExact(gates.ptr())) ||
        got(PyObject_GetAttr(x.ptr(), is_cpu)).ptr() != Py_True)
        return false;
    const py::object sizes = got(PyObject_GetAttr(x.ptr(), shape)), wanted = got(PyTuple_GetSlice(sizes.ptr(), 0, 2));
    const py::object type = got(PyObject_GetAttr(x.ptr(), dtype)), dense = got(PyObject_GetAttr(x.ptr(), layout));
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(gates.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject *const gate = PySequence_Fast_GET_ITEM(gates.ptr(), i);
        if (reinterpret_cast<PyObject *>(Py_TYPE(gate)) != types[0] ||
            got(PyObject_GetAttr(gate, dtype)).ptr() != type.ptr() ||
            got(PyObject_GetAttr(gate, is_cpu)).ptr() != Py_True ||
            got(PyObject_GetAttr(gate, layout)).ptr() != dense.ptr())
            return false;
        const int same = PyObject_RichCompareBool(got(PyObject_GetAttr(gate, shape)).ptr(), wanted.ptr(), Py_EQ);
        if (same < 0)
            throw py::error_already_set();
        if (!same)
            return false;
    }
    return count > 0;
}

} // namespace

// With Python's own functions and names that are made once: the casts of pybind11 would take longer than all of this.
Tensor tensor(const py::object &from) {
    if (from.is_none())
        return {};
    PyObject *const x = from.ptr();
    static PyObject *const data_ptr = PyUnicode_InternFromString("data_ptr"),
                           *const stride = PyUnicode_InternFromString("stride"),
                           *const dtype = PyUnicode_InternFromString("dtype");
    const py::object address = got(PyObject_CallMethodNoArgs(x, data_ptr));
    const py::object strides = got(PyObject_CallMethodNoArgs(x, stride));
    const py::object type = got(PyObject_GetAttr(x, dtype));
    PyObject *const number = dtypes ? PyDict_GetItemWithError(dtypes, type.ptr()) : nullptr;
    if (!number || !PyTuple_Check(strides.ptr()))
        throw py::type_error("a tensor of a floating-point dtype is wanted");
    Tensor t;
    t.data = PyLong_AsVoidPtr(address.ptr());
    t.dtype = static_cast<Dtype>(PyLong_AsLong(number));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(strides.ptr()) && i < 4; ++i)
        t.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    if (PyErr_Occurred())
        throw py::error_already_set();
    return t;
}

std::vector<Tensor> tensors(const py::sequence &from) {
    std::vector<Tensor> all;
    for (const py::handle &one : from)
        all.push_back(tensor(py::reinterpret_borrow<py::object>(one)));
    return all;
}

} // namespace m3em

namespace {

std::string compiler() {
    // clang says that it is gcc 4.2 as well, so it is asked first.
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

std::string architecture() {
#if defined(__x86_64__)
    return "x86_64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "other";
#endif
}

// What every instruction outside of the kernels that are chosen at run time may use.
py::list instruction_sets() {
    py::list sets;
#if defined(__SSE2__)
    sets.append("sse2");
#endif
#if defined(__AVX2__)
    sets.append("avx2");
#endif
#if defined(__FMA__)
    sets.append("fma");
#endif
#if defined(__F16C__)
    sets.append("f16c");
#endif
#if defined(__AVX512F__)
    sets.append("avx512f");
#endif
#if defined(__ARM_NEON)
    sets.append("neon");
#endif
    return sets;
}

py::object openmp() {
#if defined(_OPENMP)
    return py::int_(_OPENMP);
#else
    return py::none();
#endif
}

py::dict build_info() {
    py::dict info;
    info["version"] = M3EM_VERSION;
    info["compiler"] = compiler();
    info["cplusplus"] = static_cast<long>(__cplusplus);
    info["flags"] = M3EM_FLAGS;
    info["openmp"] = openmp();
    info["pybind11"] =
        M3EM_TEXT(PYBIND11_VERSION_MAJOR) "." M3EM_TEXT(PYBIND11_VERSION_MINOR) "." M3EM_TEXT(PYBIND11_VERSION_PATCH);
    info["python"] = PY_VERSION;
    info["architecture"] = architecture();
    info["instruction_sets"] = instruction_sets();
    return info;
}

void advise(const m3em::Tensor &t, int64_t numbers) {
    constexpr int64_t size[] = {8, 4, 2, 2};
    if (t.data)
        m3em::advise_huge_pages(t.data, numbers * size[static_cast<int>(t.dtype)]);
}

m3em::ChannelGate channel_gate(const py::object &x, const Shape &shape, int num_gates, int threads) {
    m3em::ChannelGate o = m3em::channel_gate_of(x, shape, num_gates);
    o.threads = m3em::usable_threads(threads, o.n * o.c * o.h * o.w);
    return o;
}

void channel_gate_forward(const py::object &x, const py::sequence &gates, const py::object &out, const Shape &shape,
                          int threads) {
    const std::vector<m3em::Tensor> all = tensors(gates);
    m3em::ChannelGate o = channel_gate(x, shape, int(all.size()), threads);
    o.gates = all.data();
    o.out = tensor(out);
    py::gil_scoped_release released;
    advise(o.out, o.n * o.num_gates * o.c * o.h * o.w);
    m3em::kernels().channel_gate_forward(o);
}

void channel_gate_backward(const py::object &x, const py::sequence &gates, const py::object &grad_out,
                           const py::object &grad_x, const py::sequence &grad_gates, const Shape &shape, int threads) {
    const std::vector<m3em::Tensor> all = tensors(gates), grads = tensors(grad_gates);
    m3em::ChannelGate o = channel_gate(x, shape, int(all.size()), threads);
    o.gates = all.data();
    o.grad_gates = grads.data();
    o.grad_out = tensor(grad_out);
    o.grad_x = tensor(grad_x);
    py::gil_scoped_release released;
    advise(o.grad_x, o.n * o.c * o.h * o.w);
    m3em::kernels().channel_gate_backward(o);
}

m3em::ConsensusMap consensus_map(const py::object &a, const py::object &b, uintptr_t stats, const Shape &shape,
                                 int num_scales, bool center, double eps, int threads) {
    m3em::ConsensusMap m = m3em::consensus_map_of(a, b, stats, shape, num_scales, center, eps);
    m.threads = m3em::usable_threads(threads, m.n * m.d * m.h * m.w);
    return m;
}

void consensus_map_forward(const py::object &a, const py::object &b, const py::object &out, uintptr_t stats,
                           const Shape &shape, int num_scales, bool center, double eps, int threads) {
    m3em::ConsensusMap m = consensus_map(a, b, stats, shape, num_scales, center, eps, threads);
    m.out = tensor(out);
    py::gil_scoped_release released;
    m3em::kernels().consensus_map_forward(m);
}

void consensus_map_backward(const py::object &a, const py::object &b, const py::object &grad_out,
                            const py::object &grad_a, const py::object &grad_b, uintptr_t stats, const Shape &shape,
                            int num_scales, bool center, double eps, int threads) {
    m3em::ConsensusMap m = consensus_map(a, b, stats, shape, num_scales, center, eps, threads);
    m.grad_out = tensor(grad_out);
    m.grad_a = tensor(grad_a);
    m.grad_b = tensor(grad_b);
    py::gil_scoped_release released;
    advise(m.grad_a, m.n * m.d * m.h * m.w);
    advise(m.grad_b, m.n * m.d * m.h * m.w);
    m3em::kernels().consensus_map_backward(m);
}

m3em::ConsensusPool consensus_pool(const py::object &x, const py::object &cmap, const Shape &shape, int threads) {
    m3em::ConsensusPool o = m3em::consensus_pool_of(x, cmap, shape);
    o.threads = m3em::usable_threads(threads, o.n * o.c * o.h * o.w);
    return o;
}

void consensus_pool_forward(const py::object &x, const py::object &cmap, const py::object &out, const Shape &shape,
                            int threads) {
    m3em::ConsensusPool o = consensus_pool(x, cmap, shape, threads);
    o.out = tensor(out);
    py::gil_scoped_release released;
    m3em::kernels().consensus_pool_forward(o);
}

void consensus_pool_backward(const py::object &x, const py::object &cmap, const py::object &grad_out,
                             const py::object &grad_x, const py::object &grad_cmap, const Shape &shape, int threads) {
    m3em::ConsensusPool o = consensus_pool(x, cmap, shape, threads);
    o.grad_out = tensor(grad_out);
    o.grad_x = tensor(grad_x);
    o.grad_cmap = tensor(grad_cmap);
    py::gil_scoped_release released;
    advise(o.grad_x, o.n * o.c * o.h * o.w);
    m3em::kernels().consensus_pool_backward(o);
}

m3em::GatedProjection gated_projection(const py::object &x, const py::object &weight, const Shape &shape, int64_t d,
                                       int num_gates, int threads) {
    m3em::GatedProjection o;
    o.x = tensor(x);
    o.weight = tensor(weight);
    o.n = shape[0], o.c = shape[1], o.h = shape[2], o.w = shape[3], o.d = d;
    o.num_gates = num_gates;
    o.threads = m3em::usable_threads(threads, o.n * o.c * o.h * o.w * d / 8);
    return o;
}

void gated_projection_forward(const py::object &x, const py::sequence &gates, const py::object &weight,
                              const py::object &bias, const py::object &out, const Shape &shape, int64_t d,
                              int threads) {
    const std::vector<m3em::Tensor> all = tensors(gates);
    m3em::GatedProjection o = gated_projection(x, weight, shape, d, int(all.size()), threads);
    o.gates = all.data();
    o.bias = tensor(bias);
    o.out = tensor(out);
    py::gil_scoped_release released;
    advise(o.out, o.n * o.d * o.h * o.w);
    m3em::kernels().gated_projection_forward(o);
}

void gated_projection_backward(const py::object &x, const py::sequence &gates, const py::object &weight,
                               const py::object &grad_out, const py::object &grad_x, const py::sequence &grad_gates,
                               const py::object &grad_weight, const py::object &grad_bias, const Shape &shape,
                               int64_t d, int threads) {
    const std::vector<m3em::Tensor> all = tensors(gates), grads = tensors(grad_gates);
    m3em::GatedProjection o = gated_projection(x, weight, shape, d, int(all.size()), threads);
    o.gates = all.data();
    o.grad_gates = grads.data();
    o.grad_out = tensor(grad_out);
    o.grad_x = tensor(grad_x);
    o.grad_weight = tensor(grad_weight);
    o.grad_bias = tensor(grad_bias);
    py::gil_scoped_release released;
    advise(o.grad_x, o.n * o.c * o.h * o.w);
    m3em::kernels().gated_projection_backward(o);
}

void uint8_features(uintptr_t from, uintptr_t to, uintptr_t steps, uintptr_t frames, int64_t clips, int64_t picked,
                    int64_t channels, int64_t positions, bool stream) {
    m3em::Uint8Features o;
    o.from = reinterpret_cast<const uint8_t *const *>(from);
    o.to = reinterpret_cast<void *const *>(to);
    o.steps = reinterpret_cast<const float *>(steps);
    o.frames = reinterpret_cast<const int64_t *>(frames);
    o.clips = clips, o.picked = picked, o.channels = channels, o.positions = positions;
    o.stream = stream;
    py::gil_scoped_release released;
    m3em::kernels().uint8_features(o);
}

void advise_huge_pages(uintptr_t data, int64_t bytes) {
    m3em::advise_huge_pages(reinterpret_cast<void *>(data), bytes);
}

} // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of m3em_fast. They take addresses and sizes; m3em_fast.ops is for people.";
    module.def(
        "build_info", &build_info,
        "What this module was built with. openmp is the date of the standard as the compiler gives it, or None.");
    module.def("dtypes", &m3em::set_dtypes, "Tells the number of every dtype, by the dtype.");
    module.def("types", &m3em::set_types, "Tells the types of ordinary tensors.");
    module.def("ordinary", &m3em::ordinary,
               "Whether all tensors that are there are of these types, on the CPU, and no negative views.");
    module.def("gates_fit", &m3em::gates_fit,
               "Whether gates are ordinary tensors (N,C) beside an x (N,C,H,W) on the CPU.");
    module.def("isa", [] { return m3em::kernels().isa; }, "The instruction set of the kernels in use.");
    module.def("choose_isa", &m3em::choose_kernels, "Use the kernels of another one; False where that cannot be.");
    module.def("forked", &m3em::forked, "Whether this is a forked child, where the kernels run on one thread.");
    module.def("consensus_map_stats", &m3em::consensus_map_stats);
    module.def("channel_gate_forward", &channel_gate_forward);
    module.def("channel_gate_backward", &channel_gate_backward);
    module.def("consensus_map_forward", &consensus_map_forward);
    module.def("consensus_map_backward", &consensus_map_backward);
    module.def("consensus_pool_forward", &consensus_pool_forward);
    module.def("consensus_pool_backward", &consensus_pool_backward);
    module.def("gated_projection_forward", &gated_projection_forward);
    module.def("gated_projection_backward", &gated_projection_backward);
    module.def(
        "uint8_features", &uint8_features,
        "Makes float16 of some frames of clips, uint8 (C, positions) and a step a channel. Takes the addresses of\n"
        "arrays: where clips are, where they go (64 bits each), steps (float32), numbers of frames (64 bits).");
    module.def("advise_huge_pages", &advise_huge_pages,
               "Asks for huge pages under a large buffer that nobody has touched yet; harmless where there are none.");
    m3em::bind_cuda(module);
}
