#include "cuda/consensus_map.h"

#include "cuda/ops.h"

#include <algorithm>
#include <climits>

namespace m3em {
namespace cuda {
namespace {

constexpr const char *DtypeNames[] = {"f64", "f32", "f16", "bf16"};

Map map_of(const Tensor &t) { return {t.data, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}}; }

// All but what only one of the two passes has.
ConsensusMapArguments arguments_of(const ConsensusMap &given) {
    // Kernels count samples, channels and positions in 32 bits each, elements in 64.
    if (std::max({given.n, given.d, given.h * given.w}) > INT_MAX)
        throw DriverError("consensus_map counts at most 2^31 - 1 samples, channels and positions on a card.");
    ConsensusMapArguments m = {};
    m.a = map_of(given.a), m.b = map_of(given.b);
    m.stats = given.stats;
    m.eps = given.eps;
    m.n = int(given.n), m.d = int(given.d), m.h = int(given.h), m.w = int(given.w);
    m.scales = given.num_scales;
    m.center = given.center;
    return m;
}

ConsensusMapPlan plan_of(ConsensusMapArguments &m, Dtype dtype) {
    return ConsensusMapPlan(m, dtype == Dtype::f64 ? 8 : 4, dtype != Dtype::f64);
}

enum Stage { partial, finish, backward };

Launch launch_of(Stage stage, Dtype dtype, const ConsensusMapPlan &plan, const ConsensusMapArguments &m, void *stream) {
    constexpr const char *names[] = {"partial", "finish", "backward"};
    const long long shared[] = {plan.partial_bytes, plan.finish_bytes, plan.backward_bytes};
    const int which = static_cast<int>(dtype), slot = (stage * 4 + which) * 2 + plan.seven;
    const KernelName name = {"consensus_map", names[stage], DtypeNames[which], plan.seven ? "7x7" : "any", slot};
    const long long blocks = stage == finish ? m.n : (long long)m.n * m.chunks;
    return {name, blocks, MapThreads, shared[stage], stream, &m};
}

} // namespace

ConsensusMapNeeds consensus_map_needs(Dtype dtype, const ConsensusMap &given) {
    ConsensusMapArguments m = arguments_of(given);
    const ConsensusMapPlan plan = plan_of(m, dtype);
    const long long shared = std::max({plan.partial_bytes, plan.finish_bytes, plan.backward_bytes});
    return {m.chunks * plan.cells * plan.sums, plan.stats, shared};
}

void consensus_map_forward(Module &module, void *stream, const ConsensusMap &given, void *workspace) {
    const Dtype dtype = given.a.dtype;
    ConsensusMapArguments m = arguments_of(given);
    m.out = map_of(given.out);
    m.wide = given.out.dtype != dtype;
    m.partial = workspace;
    const ConsensusMapPlan plan = plan_of(m, dtype);
    module.launch(launch_of(partial, dtype, plan, m, stream));
    module.launch(launch_of(finish, dtype, plan, m, stream));
}

void consensus_map_backward(Module &module, void *stream, const ConsensusMap &given) {
    const Dtype dtype = given.a.dtype;
    ConsensusMapArguments m = arguments_of(given);
    m.grad_out = map_of(given.grad_out);
    m.grad_a = map_of(given.grad_a), m.grad_b = map_of(given.grad_b);
    m.wide = given.grad_out.dtype != dtype;
    const ConsensusMapPlan plan = plan_of(m, dtype);
    module.launch(launch_of(backward, dtype, plan, m, stream));
}

} // namespace cuda
} // namespace m3em
