// The kernels for cards, as Python reaches them: a driver library, an image loaded on one of its devices, and the ops.
#include "bindings.h"

#include "cuda/ops.h"

namespace m3em {
namespace {

void consensus_map_forward(Module &module, uintptr_t stream, const py::object &a, const py::object &b,
                           const py::object &out, uintptr_t stats, uintptr_t partial, const Shape &shape,
                           int num_scales, bool center, double eps) {
    ConsensusMap m = consensus_map_of(a, b, stats, shape, num_scales, center, eps);
    m.out = tensor(out);
    py::gil_scoped_release released;
    cuda::consensus_map_forward(module, address(stream), m, address(partial));
}

void consensus_map_backward(Module &module, uintptr_t stream, const py::object &a, const py::object &b,
                            const py::object &grad_out, const py::object &grad_a, const py::object &grad_b,
                            uintptr_t stats, const Shape &shape, int num_scales, bool center, double eps) {
    ConsensusMap m = consensus_map_of(a, b, stats, shape, num_scales, center, eps);
    m.grad_out = tensor(grad_out);
    m.grad_a = tensor(grad_a);
    m.grad_b = tensor(grad_b);
    py::gil_scoped_release released;
    cuda::consensus_map_backward(module, address(stream), m);
}

py::tuple consensus_map_needs(int dtype, int64_t d, int64_t h, int64_t w, int num_scales, bool center) {
    ConsensusMap m;
    m.n = 1, m.d = d, m.h = h, m.w = w;
    m.num_scales = num_scales;
    m.center = center;
    const cuda::ConsensusMapNeeds needs = cuda::consensus_map_needs(static_cast<Dtype>(dtype), m);
    return py::make_tuple(needs.workspace, needs.stats, needs.shared);
}

void channel_gate_forward(Module &module, uintptr_t stream, const py::object &x, const py::sequence &gates,
                          const py::object &out, const Shape &shape) {
    const std::vector<Tensor> all = tensors(gates);
    ChannelGate o = channel_gate_of(x, shape, int(all.size()));
    o.gates = all.data();
    o.out = tensor(out);
    py::gil_scoped_release released;
    cuda::channel_gate_forward(module, address(stream), o);
}

void channel_gate_backward(Module &module, uintptr_t stream, const py::object &x, const py::sequence &gates,
                           const py::object &grad_out, const py::object &grad_x, const py::sequence &grad_gates,
                           const Shape &shape) {
    const std::vector<Tensor> all = tensors(gates), grads = tensors(grad_gates);
    ChannelGate o = channel_gate_of(x, shape, int(all.size()));
    o.gates = all.data();
    o.grad_out = tensor(grad_out);
    o.grad_x = tensor(grad_x);
    o.grad_gates = grads.data();
    py::gil_scoped_release released;
    cuda::channel_gate_backward(module, address(stream), o);
}

void consensus_pool_forward(Module &module, uintptr_t stream, const py::object &x, const py::object &cmap,
                            const py::object &out, const Shape &shape) {
    ConsensusPool o = consensus_pool_of(x, cmap, shape);
    o.out = tensor(out);
    py::gil_scoped_release released;
    cuda::consensus_pool_forward(module, address(stream), o);
}

void consensus_pool_backward(Module &module, uintptr_t stream, const py::object &x, const py::object &cmap,
                             const py::object &grad_out, const py::object &grad_x, const py::object &grad_cmap,
                             uintptr_t workspace, const Shape &shape) {
    ConsensusPool o = consensus_pool_of(x, cmap, shape);
    o.grad_out = tensor(grad_out);
    o.grad_x = tensor(grad_x);
    o.grad_cmap = tensor(grad_cmap);
    py::gil_scoped_release released;
    cuda::consensus_pool_backward(module, address(stream), o, address(workspace));
}

long long consensus_pool_workspace(int dtype, int64_t c, int64_t h, int64_t w) {
    ConsensusPool o;
    o.n = 1, o.c = c, o.h = h, o.w = w;
    return cuda::consensus_pool_workspace(static_cast<Dtype>(dtype), o);
}

} // namespace

void bind_cuda(py::module_ &module) {
    static py::exception<DriverError> error(module, "DriverError", PyExc_RuntimeError);
    static py::exception<ImageRejected> rejected(module, "ImageRejected", error);
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown)
                std::rethrow_exception(thrown);
        } catch (const ImageRejected &e) {
            py::set_error(rejected, e.what());
        } catch (const DriverError &e) {
            py::set_error(error, e.what());
        }
    });
    using Released = py::call_guard<py::gil_scoped_release>;
    py::class_<Driver, std::shared_ptr<Driver>>(module, "Driver", "A CUDA driver library, by its file or name.")
        .def(py::init<const std::string &>())
        .def("device_count", &Driver::device_count, Released())
        .def("capability", &Driver::capability, Released(), "Compute capability of a device, 70 for 7.0.")
        .def("shared_memory", &Driver::shared_memory, Released(), "Bytes that a block on a device may ask for.");
    py::class_<Module, std::shared_ptr<Module>>(module, "Module", "An image on one device of a driver.")
        .def(py::init([](std::shared_ptr<Driver> driver, int device, const py::bytes &image) {
            const std::string copy = image;
            py::gil_scoped_release released;
            return std::make_shared<Module>(std::move(driver), device, copy);
        }));
    module.def(
        "cuda_consensus_map_needs", &consensus_map_needs,
        "Numbers of the workspace and of the statistics for one sample, and bytes of shared memory for a block.");
    module.def("cuda_consensus_map_forward", &consensus_map_forward);
    module.def("cuda_consensus_map_backward", &consensus_map_backward);
    module.def("cuda_channel_gate_most", &cuda::channel_gate_most, "Gates that one call takes.");
    module.def("cuda_channel_gate_forward", &channel_gate_forward);
    module.def("cuda_channel_gate_backward", &channel_gate_backward);
    module.def("cuda_consensus_pool_workspace", &consensus_pool_workspace,
               "Numbers that the gradient of the map needs for one sample.");
    module.def("cuda_consensus_pool_forward", &consensus_pool_forward);
    module.def("cuda_consensus_pool_backward", &consensus_pool_backward);
}

} // namespace m3em
