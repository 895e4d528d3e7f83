// Chooses the kernels for this processor, once, and keeps them usable in a forked child.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace m3em {
namespace {

#define M3EM_KERNELS(isa)                                                                                              \
    Kernels {                                                                                                          \
        #isa, isa::channel_gate_forward, isa::channel_gate_backward, isa::consensus_map_forward,                       \
            isa::consensus_map_backward, isa::consensus_pool_forward, isa::consensus_pool_backward,                    \
            isa::gated_projection_forward, isa::gated_projection_backward, isa::uint8_features                         \
    }

const Kernels every[] = {
    M3EM_KERNELS(plain),
#if defined(__x86_64__)
    M3EM_KERNELS(avx2),
    M3EM_KERNELS(avx512),
#endif
};

bool runs_here(const char *isa) {
    if (!std::strcmp(isa, "plain"))
        return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!std::strcmp(isa, "avx2"))
        return avx2;
    if (!std::strcmp(isa, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return false;
}

const Kernels *find(const char *isa) {
    for (const Kernels &k : every)
        if (!std::strcmp(k.isa, isa))
            return runs_here(isa) ? &k : nullptr;
    return nullptr;
}

const Kernels *first_choice() {
    for (const char *isa : {"avx512", "avx2"})
        if (const Kernels *best = find(isa))
            return best;
    return find("plain");
}

const Kernels *chosen = nullptr;
bool in_child = false;

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

} // namespace

const Kernels &kernels() {
    if (!chosen)
        chosen = first_choice();
    return *chosen;
}

bool choose_kernels(const char *isa) {
    const Kernels *found = find(isa);
    if (found)
        chosen = found;
    return found != nullptr;
}

bool forked() { return in_child; }

int usable_threads(int wanted, int64_t work) {
    // To wake a thread takes some microseconds; so many steps take about as long.
    constexpr int64_t worth = 16 << 10;
    const int64_t useful = work / worth;
    return in_child || wanted < 1 || useful < 1 ? 1 : int(useful < wanted ? useful : wanted);
}

void advise_huge_pages(void *data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    // Below this a page fault or two costs less than the call; the figure is measured in docs/performance.md.
    constexpr int64_t worth = 4 << 20, page = 2 << 20;
    if (bytes < worth)
        return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (first < last)
        (void)madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

int64_t consensus_map_stats(int64_t h, int64_t w, int num_scales, bool center) {
    int64_t cells = 0;
    for (int k = 0; k < num_scales; ++k)
        cells += ((h >> k) > 1 ? h >> k : 1) * ((w >> k) > 1 ? w >> k : 1);
    return 3 * cells + (center ? 2 * h * w : 0);
}

} // namespace m3em
