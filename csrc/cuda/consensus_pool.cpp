#include "cuda/consensus_pool.h"

#include "cuda/host.h"
#include "cuda/ops.h"

namespace m3em {
namespace cuda {
namespace {

Beside matrix_of(const Tensor &t, Dtype x) { return {t.data, {t.stride[0], t.stride[1], 0}, t.dtype != x}; }
Beside plane_of(const Tensor &t, Dtype x) { return {t.data, {t.stride[0], t.stride[2], t.stride[3]}, t.dtype != x}; }

ConsensusPoolArguments arguments_of(const ConsensusPool &given) {
    check_counts("consensus_pool", given.n, given.c, given.h * given.w);
    ConsensusPoolArguments m = {};
    m.x = map_of(given.x);
    m.cmap = plane_of(given.cmap, given.x.dtype);
    m.n = int(given.n), m.c = int(given.c), m.h = int(given.h), m.w = int(given.w);
    return m;
}

ConsensusPoolPlan plan_of(ConsensusPoolArguments &m, Dtype dtype) {
    return ConsensusPoolPlan(m, element_of(dtype), packed(m, element_of(dtype)));
}

enum Stage { forward, backward, finish };

void launch(Module &module, void *stream, Stage stage, Dtype dtype, const ConsensusPoolPlan &plan,
            const ConsensusPoolArguments &m) {
    constexpr const char *names[] = {"forward", "backward", "finish"};
    const long long shared[] = {plan.forward_bytes, plan.backward_bytes, 0};
    const bool packs = m.walkers && stage != finish;
    const int which = static_cast<int>(dtype), slot = (stage * 4 + which) * 2 + packs;
    const KernelName name = {"consensus_pool", names[stage], DtypeNames[which], packs ? "packs" : "any", slot};
    const long long chunks = (long long)m.n * m.chunks, numbers = (long long)m.n * m.h * m.w;
    const long long blocks = stage == finish ? (numbers + PoolThreads - 1) / PoolThreads : chunks;
    module.launch({name, blocks, packs ? PackThreads : PoolThreads, shared[stage], stream, &m});
}

} // namespace

long long consensus_pool_workspace(Dtype dtype, const ConsensusPool &given) {
    ConsensusPoolArguments m = arguments_of(given);
    return ConsensusPoolPlan(m, element_of(dtype), false).workspace; // no form has more chunks than `any`
}

void consensus_pool_forward(Module &module, void *stream, const ConsensusPool &given) {
    const Dtype dtype = given.x.dtype;
    ConsensusPoolArguments m = arguments_of(given);
    m.out = matrix_of(given.out, dtype);
    m.rows = in_rows(given.x, m.c, m.h, m.w);
    const ConsensusPoolPlan plan = plan_of(m, dtype);
    launch(module, stream, forward, dtype, plan, m);
}

void consensus_pool_backward(Module &module, void *stream, const ConsensusPool &given, void *workspace) {
    const Dtype dtype = given.x.dtype;
    ConsensusPoolArguments m = arguments_of(given);
    m.grad_out = matrix_of(given.grad_out, dtype);
    m.grad_x = map_of(given.grad_x);
    m.grad_cmap = plane_of(given.grad_cmap, dtype);
    m.partial = workspace;
    Tensor x = given.x;
    if (!m.grad_cmap.data)
        m.x.data = x.data = nullptr;
    m.rows = in_rows(x, m.c, m.h, m.w) && in_rows(given.grad_x, m.c, m.h, m.w);
    const ConsensusPoolPlan plan = plan_of(m, dtype);
    launch(module, stream, backward, dtype, plan, m);
    if (m.grad_cmap.data)
        launch(module, stream, finish, dtype, plan, m);
}

} // namespace cuda
} // namespace m3em
