// Walks over the memory of a few channels of one sample, which lie together: 16 bytes at a time where they begin on
// such a boundary. One row of 49 numbers does not, many of them do.
#pragma once

#include "cuda/device.cuh"

namespace m3em {
namespace {

template <int E>
struct Count {
    static constexpr int value = E;
};

// E numbers, read and written at once.
template <class T, int E>
struct __align__(E * sizeof(T)) Few {
    T at[E];
};
template <int E, class T>
__device__ inline Few<T, E> load(const T *from) {
    return *reinterpret_cast<const Few<T, E> *>(from);
}
template <int E, class T>
__device__ inline void store(T *to, const Few<T, E> &few) {
    *reinterpret_cast<Few<T, E> *>(to) = few;
}

__device__ inline bool wide(const void *at) { return (reinterpret_cast<unsigned long long>(at) & 15) == 0; }

// Where the first of a few numbers stands: its channel, counted from the first of the slab, its position, and how many
// numbers come before those of the next channel.
struct Place {
    int c, q, left;
};

// Calls body(Count<E>, i, place of number i) for E numbers at a time until all of `count` are done. E numbers are of
// two channels at most.
template <class T, int Threads, class Body>
__device__ void for_slab(int count, int positions, bool packs_fit, const Body &body) {
    constexpr int Wide = 16 / sizeof(T);
    const int packs = packs_fit && positions >= Wide ? count / Wide : 0;
#pragma unroll 1
    for (int k = threadIdx.x; k < packs; k += Threads) {
        const int i = k * Wide, c = i / positions, q = i - c * positions;
        body(Count<Wide>{}, i, Place{c, q, positions - q});
    }
#pragma unroll 1
    for (int i = packs * Wide + threadIdx.x; i < count; i += Threads) {
        const int c = i / positions;
        body(Count<1>{}, i, Place{c, i - c * positions, 1});
    }
}

// A walk over a slab of whole packs by `active` threads, see walkers(): a thread starts at its place and goes on by
// `channels` whole channels a step.
template <class T>
struct Walk {
    static constexpr int Wide = 16 / sizeof(T);
    int channels;
    Place place;
    __device__ Walk(int active, int positions) : channels(active * Wide / positions) {
        const int i = threadIdx.x * Wide;
        place.c = i / positions, place.q = i - place.c * positions, place.left = positions - place.q;
    }
};

// The sum over a warp, the same for all of its lanes, in one order.
template <class A>
__device__ inline A warp_sum(A x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// A tensor in the type of the maps or, `wide`, in the accumulation type.
template <class T, class A>
__device__ inline A read(const void *data, long long at, bool accumulated) {
    return accumulated ? static_cast<const A *>(data)[at] : A(widen(static_cast<const T *>(data)[at]));
}
template <class T, class A>
__device__ inline void write(void *data, long long at, bool accumulated, A value) {
    if (accumulated)
        static_cast<A *>(data)[at] = value;
    else
        static_cast<T *>(data)[at] = narrow<T>(value);
}

} // namespace
} // namespace m3em
