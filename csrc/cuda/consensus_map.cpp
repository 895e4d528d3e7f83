#include "cuda/consensus_map.h"

#include "cuda/host.h"
#include "cuda/ops.h"

namespace m3em {
namespace cuda {
namespace {

// All but what only one of the two passes has.
ConsensusMapArguments arguments_of(const ConsensusMap &given) {
    check_counts("consensus_map", given.n, given.d, given.h * given.w);
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
    return ConsensusMapPlan(m, number_of(dtype), dtype != Dtype::f64);
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
