// Walks over a chunk of the channels of one sample in channels_last memory of whole packs, see last_in_packs(): a
// thread has one pack of channels and goes from position to position, so that neighbouring threads read neighbouring
// packs.
#pragma once

#include "cuda/words.cuh"

namespace m3em {
namespace {

// Numbers from position to position.
__device__ inline long long step_of(const Map &map, int w) { return w > 1 ? map.stride[3] : map.stride[2]; }

// The pack of a thread, among those of `packs` in the chunk's channels, and the positions that it has: group, group +
// groups, and so on. Those of a group lie within whole packs.
struct Across {
    int packs, pack, group, groups;
    bool walks;
    __device__ Across(int packs, int threads)
        : packs(packs), pack(int(threadIdx.x) % packs), group(int(threadIdx.x) / packs), groups(threads / packs),
          walks(group < groups) {}
};

// Numbers of shared memory that a thread reads at once: 16 bytes.
template <class A>
constexpr int PartOf = 16 / sizeof(A);

// E numbers of shared memory, which begin on 16 bytes.
template <int E, class A>
__device__ inline Few<A, E> load_row(const A *from) {
    Few<A, E> few;
#pragma unroll
    for (int e = 0; e < E; e += PartOf<A>) {
        const Few<A, PartOf<A>> part = load<PartOf<A>>(from + e);
#pragma unroll
        for (int i = 0; i < PartOf<A>; ++i)
            few.at[e + i] = part.at[i];
    }
    return few;
}

// Where number e of a thread is, if each has a row in parts of 16 bytes: thread by thread, then part by part, so that
// neighbouring threads meet neighbouring banks.
template <class A>
__device__ inline int parted(int thread, int e, int threads) {
    constexpr int Part = PartOf<A>;
    return (e / Part * threads + thread) * Part + e % Part;
}

} // namespace
} // namespace m3em
