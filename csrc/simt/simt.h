// Runs a CUDA kernel on the CPU, block by block, with real threads of a block, barriers and shared memory.
//
// A thread of a block is a fiber: it runs until it meets a barrier, then the next one does. The order is a choice, so
// that a test can take several: a kernel that forgets a barrier gives another result, or NaN, in one of them. What no
// card forgives is an error here: a barrier that not all threads of a block reach, or reach at different places.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define M3EM_SIMT
#define __global__
#define __device__
#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define M3EM_SHARED(name) unsigned char *const name = ::simt::shared()
#define threadIdx (::simt::thread())
#define blockIdx (::simt::block())
#define __syncthreads() ::simt::barrier(__FILE__, __LINE__)

namespace simt {

struct Index {
    unsigned x, y, z;
};

const Index &thread();
const Index &block();
unsigned char *shared();
void barrier(const char *file, int line);

enum class Order : int { forward = 0, reverse = 1, shuffled = 2 };

// Runs `kernel(arguments)` for a grid of `blocks` blocks of `threads` threads. Shared memory is of the exact size and
// full of NaN before every block. Returns null, or what went wrong in one line (valid until the next call).
const char *launch(void (*kernel)(const void *), const void *arguments, int64_t blocks, int threads, int64_t shared,
                   Order order);

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

} // namespace simt
