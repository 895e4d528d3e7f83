// What device code shares: numbers in the accumulation type, tensors as the host describes them, shared memory.
//
// The same files are compiled by NVRTC for a card and, with csrc/simt in the place of CUDA's headers, by the host's
// compiler, so nothing of CUDA is used here that csrc/simt does not have.
#pragma once

#include "cuda/arguments.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef M3EM_SIMT
#define M3EM_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// A kernel by its plain name, which the launcher looks up: a call of a function template of the device. At least
// `blocks` of them fit on a multiprocessor.
#define M3EM_KERNEL(name, threads, blocks, arguments, ...)                                                             \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const arguments given) { __VA_ARGS__(given); }

namespace m3em {
namespace {

template <class T>
struct acc_of {
    using type = float;
};
template <>
struct acc_of<double> {
    using type = double;
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class A>
__device__ inline T narrow(A x) {
    return T(x);
}
template <>
__device__ inline __half narrow<__half, float>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
    return __float2bfloat16_rn(x);
}

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline bool finite(float x) { return fabsf(x) <= 3.402823466e38f; }
__device__ inline bool finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// What a block works on where the channels of a sample are split into chunks: channels c0 .. c0+count of one sample.
struct Part {
    long long n;
    int c0, count;
    __device__ Part(int chunk, int chunks, int channels)
        : n(blockIdx.x / chunks), c0(int(blockIdx.x % chunks) * chunk),
          count(c0 + chunk < channels ? chunk : channels - c0) {}
};

template <class T>
__device__ inline T *sample_of(const Map &map, long long n, long long c) {
    return static_cast<T *>(map.data) + n * map.stride[0] + c * map.stride[1];
}

// 16 bytes, the widest access.
template <class T>
struct __align__(16) Pack {
    T at[16 / sizeof(T)];
};

} // namespace
} // namespace m3em
