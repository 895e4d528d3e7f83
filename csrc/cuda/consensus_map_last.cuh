// Tiles of the kernels for 7x7 and 14x14 maps from and to channels_last memory, see last_in_packs(): in shared memory
// they lie as all others do, channel by channel, so everything else is the same to the bit.
#pragma once

#include "cuda/consensus_map.cuh"
#include "cuda/slab.cuh"

namespace m3em {
namespace {

// Whether all maps of a call are channels_last. Those of one channel lie channel by channel, whatever their stride.
__device__ inline bool are_last(const ConsensusMapArguments &m) { return m.d > 1 && m.a.stride[1] == 1; }

// A walk over a tile of Channels channels, E of them at a time. A thread has one column of positions, and its
// neighbours the next channels of the same one, as far as they lie in one line of a cache: eight times 16 bytes at 7x7;
// of the eighteen channels of a step at 14x14, where packs would not end with the step, nine pairs.
template <class T, int Side, int Channels, int E>
struct LastTile {
    static constexpr int Threads = Side == 7 ? SevenThreads : FourteenThreads, Positions = Side * Side;
    static constexpr int Beside = Side == 7 ? 8 : 9, Team = Beside * Side, Teams = Threads / Team;
    static constexpr int Parts = Channels / (Beside * E); // that teams take in turn, of one map and of the other
    static_assert(Parts * Beside * E == Channels, "a tile is whole parts");

    // body(whether it is the second map, first channel, column) for all that this thread has of `count` channels.
    template <class Body>
    static __device__ void each(int count, const Body &body) {
        const int team = int(threadIdx.x) / Team, at = int(threadIdx.x) - team * Team, column = at / Beside;
        if (team >= Teams)
            return;
#pragma unroll 1
        for (int part = team; part < 2 * Parts; part += Teams)
            if (const int c = (part / 2 * Beside + at - column * Beside) * E; c < count)
                body(part % 2 == 1, c, column);
    }

    // Channels c0 .. c0+count of both maps of a sample, to shared memory.
    static __device__ void load(const ConsensusMapArguments &m, long long n, int c0, int count, T *tile_a, T *tile_b) {
        each(count, [&](bool second, int c, int column) {
            const Map &map = second ? m.b : m.a;
            const T *const from = sample_of<const T>(map, n, c0 + c) + column * map.stride[3];
            T *const to = (second ? tile_b : tile_a) + c * Positions + column;
            Few<T, E> lines[Side];
#pragma unroll
            for (int y = 0; y < Side; ++y)
                lines[y] = m3em::load<E>(from + y * map.stride[2]);
#pragma unroll
            for (int y = 0; y < Side; ++y)
#pragma unroll
                for (int e = 0; e < E; ++e)
                    to[e * Positions + y * Side] = lines[y].at[e];
        });
    }

    // And those gradients from there that are wanted.
    static __device__ void store(const ConsensusMapArguments &m, long long n, int c0, int count, const T *tile_a,
                                 const T *tile_b) {
        each(count, [&](bool second, int c, int column) {
            const Map &map = second ? m.grad_b : m.grad_a;
            if (!map.data)
                return;
            const T *from = (second ? tile_b : tile_a) + c * Positions + column;
            T *to = sample_of<T>(map, n, c0 + c) + column * map.stride[3];
#pragma unroll 2 // of more lines the compiler takes the packs apart
            for (int y = 0; y < Side; ++y, from += Side, to += map.stride[2]) {
                Few<T, E> few;
#pragma unroll
                for (int e = 0; e < E; ++e)
                    few.at[e] = from[e * Positions];
                m3em::store<E>(to, few);
            }
        });
    }
};

} // namespace
} // namespace m3em
