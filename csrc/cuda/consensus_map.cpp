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

// The kernels that serve all maps that are there.
MapForm form_of(const ConsensusMapArguments &m, const ConsensusMap &given) {
    const int element = element_of(given.a.dtype), wide = 16 / element;
    bool rows = true, last = m.d % wide == 0;
    for (const Tensor *t : {&given.a, &given.b, &given.grad_a, &given.grad_b}) {
        const Map map = map_of(*t);
        rows = rows && in_rows(*t, m.d, m.h, m.w) && in_packs(map, wide);
        last = last && last_in_packs(map, m.h, m.w, wide);
    }
    return rows || last ? ConsensusMapPlan::form_of(m, element) : MapForm::any;
}

enum Stage { partial, finish, backward };

Launch launch_of(Stage stage, Dtype dtype, const ConsensusMapPlan &plan, MapForm form, const ConsensusMapArguments &m,
                 void *stream) {
    constexpr const char *names[] = {"partial", "finish", "backward"}, *forms[] = {"any", "7x7", "14x14"};
    constexpr int threads[][3] = {{MapThreads, MapThreads, MapThreads},
                                  {SevenThreads, FinishThreads, SevenThreads},
                                  {FourteenThreads, MapThreads, FourteenThreads}};
    const long long shared[] = {plan.partial_bytes, plan.finish_bytes, plan.backward_bytes};
    // What chunks of 14x14 leave is as `any` has it.
    if (stage == finish && form == MapForm::fourteen)
        form = MapForm::any;
    const int which = static_cast<int>(dtype), of = static_cast<int>(form), slot = (stage * 4 + which) * 3 + of;
    const KernelName name = {"consensus_map", names[stage], DtypeNames[which], forms[of], slot};
    const long long blocks = stage == finish ? m.n : (long long)m.n * m.chunks;
    return {name, blocks, threads[of][stage], shared[stage], stream, &m};
}

} // namespace

ConsensusMapNeeds consensus_map_needs(Dtype dtype, const ConsensusMap &given) {
    ConsensusMapArguments m = arguments_of(given);
    m.n = 1;
    const ConsensusMapPlan plan(m, element_of(dtype), MapForm::any);
    const long long shared = std::max({plan.partial_bytes, plan.finish_bytes, plan.backward_bytes});
    // What the memory of the maps is like is not known yet.
    const MapForm best = ConsensusMapPlan::form_of(m, element_of(dtype));
    const long long workspace = std::max(plan.workspace, ConsensusMapPlan(m, element_of(dtype), best).workspace);
    return {workspace, plan.stats, shared};
}

void consensus_map_forward(Module &module, void *stream, const ConsensusMap &given, void *workspace) {
    const Dtype dtype = given.a.dtype;
    ConsensusMapArguments m = arguments_of(given);
    m.out = map_of(given.out);
    m.wide = given.out.dtype != dtype;
    m.partial = workspace;
    const MapForm form = form_of(m, given);
    const ConsensusMapPlan plan(m, element_of(dtype), form);
    module.launch(launch_of(partial, dtype, plan, form, m, stream));
    module.launch(launch_of(finish, dtype, plan, form, m, stream));
}

void consensus_map_backward(Module &module, void *stream, const ConsensusMap &given) {
    const Dtype dtype = given.a.dtype;
    ConsensusMapArguments m = arguments_of(given);
    m.grad_out = map_of(given.grad_out);
    m.grad_a = map_of(given.grad_a), m.grad_b = map_of(given.grad_b);
    m.wide = given.grad_out.dtype != dtype;
    const MapForm form = form_of(m, given);
    const ConsensusMapPlan plan(m, element_of(dtype), form);
    module.launch(launch_of(backward, dtype, plan, form, m, stream));
}

} // namespace cuda
} // namespace m3em
