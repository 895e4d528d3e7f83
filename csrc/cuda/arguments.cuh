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

// Rows of an odd number of words: then neither a walk along a row nor one down a column meets a bank twice.
__host__ __device__ constexpr int odd(int count) { return count | 1; }

} // namespace
} // namespace m3em
