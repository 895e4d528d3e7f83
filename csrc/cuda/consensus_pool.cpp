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
    return ConsensusPoolPlan(m, number_of(dtype), dtype != Dtype::f64);
}

enum Stage { forward, backward, finish };

void launch(Module &module, void *stream, Stage stage, Dtype dtype, const ConsensusPoolPlan &plan,
            const ConsensusPoolArguments &m) {
    constexpr const char *names[] = {"forward", "backward", "finish"};
    const long long shared[] = {plan.forward_bytes, plan.backward_bytes, 0};
    const bool seven = plan.seven && stage != finish;
    const int which = static_cast<int>(dtype), slot = (stage * 4 + which) * 2 + seven;
    const KernelName name = {"consensus_pool", names[stage], DtypeNames[which], seven ? "7x7" : "any", slot};
    const long long blocks = stage == finish ? m.n : (long long)m.n * m.chunks;
    module.launch({name, blocks, PoolThreads, shared[stage], stream, &m});
}

} // namespace

long long consensus_pool_workspace(Dtype dtype, const ConsensusPool &given) {
    ConsensusPoolArguments m = arguments_of(given);
    return plan_of(m, dtype).workspace;
}

void consensus_pool_forward(Module &module, void *stream, const ConsensusPool &given) {
    ConsensusPoolArguments m = arguments_of(given);
    m.out = matrix_of(given.out, given.x.dtype);
    m.rows = in_rows(given.x, m.c, m.h, m.w);
    launch(module, stream, forward, given.x.dtype, plan_of(m, given.x.dtype), m);
}

void consensus_pool_backward(Module &module, void *stream, const ConsensusPool &given, void *workspace) {
    const Dtype dtype = given.x.dtype;
    ConsensusPoolArguments m = arguments_of(given);
    m.grad_out = matrix_of(given.grad_out, dtype);
    m.grad_x = map_of(given.grad_x);
    m.grad_cmap = plane_of(given.grad_cmap, dtype);
    m.partial = workspace;
    if (!m.grad_cmap.data)
        m.x.data = nullptr;
    m.rows = (!m.x.data || in_rows(given.x, m.c, m.h, m.w)) && in_rows(given.grad_x, m.c, m.h, m.w);
    const ConsensusPoolPlan plan = plan_of(m, dtype);
    launch(module, stream, backward, dtype, plan, m);
    if (m.grad_cmap.data)
        launch(module, stream, finish, dtype, plan, m);
}

} // namespace cuda
} // namespace m3em
