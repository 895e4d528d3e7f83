// What the CPU kernels take, and which instruction sets they are compiled for. Plain data: addresses, sizes, strides.
#pragma once

#include <cstdint>

namespace m3em {

enum class Dtype : int { f64 = 0, f32 = 1, f16 = 2, bf16 = 3 };

// A tensor of up to four dimensions; strides count elements, as torch's do.
struct Tensor {
    void *data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t stride[4] = {0, 0, 0, 0};
};

struct ConsensusMap {
    Tensor a, b;           // (N,D,H,W)
    Tensor out;            // forward: (N,1,H,W), contiguous
    Tensor grad_out;       // backward: (N,1,H,W), any strides
    Tensor grad_a, grad_b; // backward: like a and b; no data where no gradient is wanted
    // For the backward, in the accumulation type: three numbers a cell (see consensus_map.cpp), then with `center` the
    // means of a and of b at every position. No data where no backward will follow.
    void *stats = nullptr;
    int64_t n = 0, d = 0, h = 0, w = 0;
    int num_scales = 1;
    bool center = false;
    double eps = 1e-8;
    int threads = 1;
};

// Numbers that `stats` holds for every sample.
int64_t consensus_map_stats(int64_t h, int64_t w, int num_scales, bool center);

struct ChannelGate {
    Tensor x;                           // (N,C,H,W)
    const Tensor *gates = nullptr;      // num_gates times (N,C)
    Tensor out;                         // forward: (N,G*C,H,W), row-major or channels_last as x is
    Tensor grad_out;                    // backward: (N,G*C,H,W), any strides
    Tensor grad_x;                      // backward: like x
    const Tensor *grad_gates = nullptr; // backward: like the gates; no data where no gradient is wanted
    int num_gates = 1;
    int64_t n = 0, c = 0, h = 0, w = 0;
    int threads = 1;
};

struct ConsensusPool {
    Tensor x;         // (N,C,H,W); in the backward no data where only its own gradient is wanted
    Tensor cmap;      // (N,1,H,W), or no data for the plain mean
    Tensor out;       // forward: (N,C)
    Tensor grad_out;  // backward: (N,C)
    Tensor grad_x;    // backward: like x, or no data
    Tensor grad_cmap; // backward: (N,1,H,W) contiguous, or no data
    int64_t n = 0, c = 0, h = 0, w = 0;
    int threads = 1;
};

struct GatedProjection {
    Tensor x;                           // (N,C,H,W)
    const Tensor *gates = nullptr;      // num_gates times (N,C)
    Tensor weight;                      // (D,G*C)
    Tensor bias;                        // (D), or no data
    Tensor out;                         // forward: (N,D,H,W), row-major or channels_last as x is
    Tensor grad_out;                    // backward: (N,D,H,W), any strides
    Tensor grad_x;                      // backward, these four: no data where no gradient is wanted
    const Tensor *grad_gates = nullptr; // like the gates
    Tensor grad_weight;                 // like the weight
    Tensor grad_bias;                   // like the bias
    int num_gates = 1;
    int64_t n = 0, c = 0, h = 0, w = 0, d = 0;
    int threads = 1;
};

// No op: what a feature store reads. One thread, for others read beside it.
struct Uint8Features {
    const uint8_t *const *from = nullptr; // where each clip's frames (C, positions) are, one behind the other
    void *const *to = nullptr;            // where those that are picked go, in float16
    const float *steps = nullptr;         // (C)
    const int64_t *frames = nullptr;      // the picked ones
    int64_t clips = 0, picked = 0, channels = 0, positions = 0;
    bool stream = false; // past the caches, which do not hold it until it is used
};

#define M3EM_DECLARE_KERNELS(isa)                                                                                      \
    namespace isa {                                                                                                    \
    void channel_gate_forward(const ChannelGate &);                                                                    \
    void channel_gate_backward(const ChannelGate &);                                                                   \
    void consensus_map_forward(const ConsensusMap &);                                                                  \
    void consensus_map_backward(const ConsensusMap &);                                                                 \
    void consensus_pool_forward(const ConsensusPool &);                                                                \
    void consensus_pool_backward(const ConsensusPool &);                                                               \
    void gated_projection_forward(const GatedProjection &);                                                            \
    void gated_projection_backward(const GatedProjection &);                                                           \
    void uint8_features(const Uint8Features &);                                                                        \
    }

M3EM_DECLARE_KERNELS(plain)
#if defined(__x86_64__)
M3EM_DECLARE_KERNELS(avx2)
M3EM_DECLARE_KERNELS(avx512)
#endif

// The kernels that this process uses.
struct Kernels {
    const char *isa;
    void (*channel_gate_forward)(const ChannelGate &);
    void (*channel_gate_backward)(const ChannelGate &);
    void (*consensus_map_forward)(const ConsensusMap &);
    void (*consensus_map_backward)(const ConsensusMap &);
    void (*consensus_pool_forward)(const ConsensusPool &);
    void (*consensus_pool_backward)(const ConsensusPool &);
    void (*gated_projection_forward)(const GatedProjection &);
    void (*gated_projection_backward)(const GatedProjection &);
    void (*uint8_features)(const Uint8Features &);
};

const Kernels &kernels();
// False where this machine cannot run `isa`, or the build does not have it.
bool choose_kernels(const char *isa);

// The number of threads that a parallel region may have, where there are `work` steps in all: 1 where there is little
// to do, and in a forked child, where OpenMP would wait for ever for the threads that the fork left behind.
int usable_threads(int wanted, int64_t work);
bool forked();

// Asks for huge pages under a large buffer that nobody has touched yet; nothing happens where the system has none.
void advise_huge_pages(void *data, int64_t bytes);

} // namespace m3em
