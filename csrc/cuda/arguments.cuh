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

// Whether every sample of a map that is there begins with a whole pack of 16 bytes, which are `wide` numbers.
__host__ __device__ inline bool in_packs(const Map &map, int wide) {
    return !map.data || ((reinterpret_cast<unsigned long long>(map.data) & 15) == 0 && map.stride[0] % wide == 0);
}

// Whether a map that is there holds the channels of a position one after another, as channels_last does, in whole packs
// of 16 bytes, and all positions one after another at even distances.
__host__ __device__ inline bool last_in_packs(const Map &map, int h, int w, int wide) {
    const long long *s = map.stride;
    return in_packs(map, wide) && (!map.data || (s[1] == 1 && (w == 1 || h == 1 || s[2] == w * s[3]) &&
                                                 (h == 1 || s[2] % wide == 0) && (w == 1 || s[3] % wide == 0)));
}

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

// i / d for small numbers, without a division: i * d below 2^32, and d above 1.
__host__ __device__ constexpr unsigned inverse_of(int d) { return unsigned((1ull << 32) / d + 1); }
__host__ __device__ constexpr int quotient(unsigned i, unsigned inverse) {
    return int((unsigned long long)i * inverse >> 32);
}

// Rows of an odd number of words: then neither a walk along a row nor one down a column meets a bank twice.
__host__ __device__ constexpr int odd(int count) { return count | 1; }

} // namespace
} // namespace m3em
