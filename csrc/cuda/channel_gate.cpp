#include "cuda/channel_gate.h"

#include "cuda/host.h"
#include "cuda/ops.h"

namespace m3em {
namespace cuda {
namespace {

Gate gate_of(const Tensor &t, Dtype x) { return {t.data, {t.stride[0], t.stride[1]}, t.dtype != x}; }

ChannelGateArguments arguments_of(const ChannelGate &given) {
    check_counts("channel_gate", given.n, std::max<int64_t>(given.c, given.num_gates), given.h * given.w);
    if (given.num_gates > MaxGates)
        throw DriverError("channel_gate takes at most " + std::to_string(MaxGates) + " gates on a card.");
    ChannelGateArguments m = {};
    m.x = map_of(given.x);
    m.n = int(given.n), m.c = int(given.c), m.h = int(given.h), m.w = int(given.w);
    m.num_gates = given.num_gates;
    for (int g = 0; g < m.num_gates; ++g)
        m.gates[g] = gate_of(given.gates[g], given.x.dtype);
    return m;
}

void launch(Module &module, void *stream, bool backward, const ChannelGate &given, ChannelGateArguments &m) {
    const Dtype dtype = given.x.dtype;
    const ChannelGatePlan plan(m, element_of(dtype), packed(m, element_of(dtype)));
    const bool packs = m.active > 0;
    const int which = static_cast<int>(dtype), slot = (backward * 4 + which) * 2 + packs;
    const KernelName name = {"channel_gate", backward ? "backward" : "forward", DtypeNames[which],
                             packs ? "packs" : "any", slot};
    module.launch({name, (long long)m.n * m.chunks, GateThreads, backward ? plan.backward_bytes : plan.forward_bytes,
                   stream, &m});
}

} // namespace

int channel_gate_most() { return MaxGates; }

void channel_gate_forward(Module &module, void *stream, const ChannelGate &given) {
    ChannelGateArguments m = arguments_of(given);
    m.out = map_of(given.out);
    m.wide = given.out.dtype != given.x.dtype;
    m.rows = !m.wide && in_rows(given.x, m.c, m.h, m.w) && in_rows(given.out, (int64_t)m.c * m.num_gates, m.h, m.w);
    m.across = given.out.stride[3] != 1;
    launch(module, stream, false, given, m);
}

void channel_gate_backward(Module &module, void *stream, const ChannelGate &given) {
    ChannelGateArguments m = arguments_of(given);
    m.grad_out = map_of(given.grad_out);
    m.grad_x = map_of(given.grad_x);
    for (int g = 0; g < m.num_gates; ++g)
        m.grads[g] = gate_of(given.grad_gates[g], given.x.dtype);
    m.wide = given.grad_out.dtype != given.x.dtype;
    m.rows = !m.wide && in_rows(given.x, m.c, m.h, m.w) && in_rows(given.grad_x, m.c, m.h, m.w) &&
             in_rows(given.grad_out, (int64_t)m.c * m.num_gates, m.h, m.w);
    launch(module, stream, true, given, m);
}

} // namespace cuda
} // namespace m3em
