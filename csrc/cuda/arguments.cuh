// What kernels are given, as the host and the device agree on it. The host's compiler knows nothing of CUDA.
#pragma once

#if !defined(__CUDACC__) && !defined(M3EM_SIMT)
#define __host__
#define __device__
#endif

namespace m3em {
namespace {

// A tensor (N,C,H,W); strides count elements.
struct Map {
    void *data;
    long long stride[4];
};

// How many of a block's threads walk together over channels of `positions` numbers that lie one after another, `wide`
// numbers a thread at a time, so that each meets the same positions in every step: a step is whole channels. 0 where no
// walk is one.
__host__ __device__ constexpr int walkers(int threads, int positions, int wide) {
    int a = positions, b = wide;
    while (b > 0) {
        const int rest = a % b;
        a = b, b = rest;
    }
    const int period = positions / a;
    return positions < wide ? 0 : threads / period * period;
}

// Rows of an odd number of words: then neither a walk along a row nor one down a column meets a bank twice.
__host__ __device__ constexpr int odd(int count) { return count | 1; }

} // namespace
} // namespace m3em
