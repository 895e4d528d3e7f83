// consensus_map's device code on the CPU, behind two functions of C for a test.
#include "simt/simt.h"

#include "cuda/consensus_map.cu"
#include "cuda/consensus_map.h"

namespace {

#define M3EM_TABLE(stage)                                                                                              \
    {M3EM_ENTRY(stage, f64, any),                                                                                      \
     M3EM_ENTRY(stage, f32, any),                                                                                      \
     M3EM_ENTRY(stage, f16, any),                                                                                      \
     M3EM_ENTRY(stage, bf16, any),                                                                                     \
     nullptr,                                                                                                          \
     M3EM_ENTRY(stage, f32, 7x7),                                                                                      \
     M3EM_ENTRY(stage, f16, 7x7),                                                                                      \
     M3EM_ENTRY(stage, bf16, 7x7)}
#define M3EM_ENTRY(stage, dtype, form)                                                                                 \
    [](const void *given) {                                                                                            \
        consensus_map_##stage##_##dtype##_##form(*static_cast<const m3em::ConsensusMapArguments *>(given));            \
    }

using Entry = void (*)(const void *);
const Entry partials[8] = M3EM_TABLE(partial), finishes[8] = M3EM_TABLE(finish), backwards[8] = M3EM_TABLE(backward);

} // namespace

#define M3EM_API extern "C" __attribute__((visibility("default")))

// Numbers of the workspace and of the statistics of one sample.
M3EM_API void simt_consensus_map_sizes(m3em::ConsensusMapArguments *m, int dtype, long long *sizes) {
    const m3em::ConsensusMapPlan plan(*m, dtype == 0 ? 8 : 4, dtype != 0);
    sizes[0] = plan.workspace, sizes[1] = plan.stats;
}

// `general`: the kernels for every shape, even where there are special ones. Null, or what went wrong.
M3EM_API const char *simt_consensus_map(m3em::ConsensusMapArguments *m, int dtype, int backward, int general,
                                        int order) {
    const m3em::ConsensusMapPlan plan(*m, dtype == 0 ? 8 : 4, dtype != 0);
    const int entry = dtype + (plan.seven && !general ? 4 : 0);
    const auto run = [&](const Entry *table, long long blocks, long long shared) {
        return simt::launch(table[entry], m, blocks, m3em::MapThreads, shared, static_cast<simt::Order>(order));
    };
    const long long blocks = (long long)m->n * m->chunks;
    if (backward)
        return run(backwards, blocks, plan.backward_bytes);
    const char *error = run(partials, blocks, plan.partial_bytes);
    return error ? error : run(finishes, m->n, plan.finish_bytes);
}
