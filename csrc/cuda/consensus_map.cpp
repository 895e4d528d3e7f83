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

// Whether the kernels for 7x7 serve all maps that are there.
bool seven_of(const ConsensusMapArguments &m, const ConsensusMap &given) {
    const int element = element_of(given.a.dtype);
    if (!ConsensusMapPlan::seven_fits(m, element))
        return false;
    for (const Tensor *t : {&given.a, &given.b, &given.grad_a, &given.grad_b})
        if (!in_rows(*t, m.d, m.h, m.w) || !in_packs(*t, element))
            return false;
    return true;
}

enum Stage { partial, finish, backward };

Launch launch_of(Stage stage, Dtype dtype, const ConsensusMapPlan &plan, bool seven, const ConsensusMapArguments &m,
                 void *stream) {
    constexpr const char *names[] = {"partial", "finish", "backward"};
    const long long shared[] = {plan.partial_bytes, plan.finish_bytes, plan.backward_bytes};
    const int which = static_cast<int>(dtype), slot = (stage * 4 + which) * 2 + seven;
    const KernelName name = {"consensus_map", names[stage], DtypeNames[which], seven ? "7x7" : "any", slot};
    const long long blocks = stage == finish ? m.n : (long long)m.n * m.chunks;
    const int threads = !seven ? MapThreads : stage == finish ? FinishThreads : SevenThreads;
    return {name, blocks, threads, shared[stage], stream, &m};
}

} // namespace

ConsensusMapNeeds consensus_map_needs(Dtype dtype, const ConsensusMap &given) {
    ConsensusMapArguments m = arguments_of(given);
    m.n = 1;
    const ConsensusMapPlan plan(m, element_of(dtype), false);
    const long long shared = std::max({plan.partial_bytes, plan.finish_bytes, plan.backward_bytes});
    long long workspace = plan.workspace;
    // What the memory of the maps is like is not known yet.
    if (ConsensusMapPlan::seven_fits(m, element_of(dtype)))
        workspace = std::max(workspace, ConsensusMapPlan(m, element_of(dtype), true).workspace);
    return {workspace, plan.stats, shared};
}

void consensus_map_forward(Module &module, void *stream, const ConsensusMap &given, void *workspace) {
    const Dtype dtype = given.a.dtype;
    ConsensusMapArguments m = arguments_of(given);
    m.out = map_of(given.out);
    m.wide = given.out.dtype != dtype;
    m.partial = workspace;
    const bool seven = seven_of(m, given);
    const ConsensusMapPlan plan(m, element_of(dtype), seven);
    module.launch(launch_of(partial, dtype, plan, seven, m, stream));
    module.launch(launch_of(finish, dtype, plan, seven, m, stream));
}

void consensus_map_backward(Module &module, void *stream, const ConsensusMap &given) {
    const Dtype dtype = given.a.dtype;
    ConsensusMapArguments m = arguments_of(given);
    m.grad_out = map_of(given.grad_out);
    m.grad_a = map_of(given.grad_a), m.grad_b = map_of(given.grad_b);
    m.wide = given.grad_out.dtype != dtype;
    const bool seven = seven_of(m, given);
    const ConsensusMapPlan plan(m, element_of(dtype), seven);
    module.launch(launch_of(backward, dtype, plan, seven, m, stream));
}

} // namespace cuda
} // namespace m3em
