// Pieces of the kernels of consensus_map for 14x14 maps (consensus_map_fourteen.cuh): tiles on their way, two lines of
// a channel in a thread's registers, and windows that are put together from several threads' lines.
#pragma once

#include "cuda/async.cuh"
#include "cuda/consensus_map.cuh"
#include "cuda/slab.cuh"

namespace m3em {
namespace {

constexpr int FourteenPairs = 7, FourteenPair = 28; // pairs of lines, and the numbers of one
constexpr int FourteenActive = FourteenStep * FourteenPairs;
constexpr int FourteenOwn = FourteenPair + 7; // positions and cells of the second scale that a thread has
constexpr int FourteenSecond = 49, FourteenThird = 9;
constexpr int FourteenCells = FourteenPositions + FourteenSecond + FourteenThird;
constexpr int FourteenLanes = 14; // threads that share a cell of the third scale
constexpr int FourteenLeft = 6;   // words that a pair of lines leaves in its place; results come behind them

// A half of the threads copies one map, the other half the other one. This is whether a thread copies the second.
__device__ inline bool of_second_map() { return int(threadIdx.x) >= FourteenThreads / 2; }

// body(where the pack begins) for all packs of a thread's map in a tile of `count` channels, at most Channels.
template <class T, int Channels, class Body>
__device__ inline void each_pack_of_half(int count, const Body &body) {
    constexpr int Wide = 16 / sizeof(T), Active = 63;
    constexpr int Turns = Channels * FourteenPositions / Wide / Active;
    static_assert(Turns * Active * Wide == Channels * FourteenPositions, "a tile is whole turns");
    const int lane = int(threadIdx.x) % (FourteenThreads / 2), packs = count * FourteenPositions / Wide;
    if (lane >= Active)
        return;
    if (count == Channels) {
#pragma unroll
        for (int k = 0; k < Turns; ++k)
            body((lane + k * Active) * Wide);
    } else {
#pragma unroll 1
        for (int i = lane; i < packs; i += Active)
            body(i * Wide);
    }
}

// The four positions of cell k of the second scale.
__device__ constexpr int place_in_lines(int k, int i) { return 2 * k + i % 2 + i / 2 * 14; }

// Two lines of a channel.
template <class T>
struct Lines {
    Few<T, 4> unit[FourteenPair / 4];
    __device__ void load(const T *from) {
#pragma unroll
        for (int i = 0; i < FourteenPair / 4; ++i)
            unit[i] = m3em::load<4>(from + 4 * i);
    }
    __device__ void store(T *to) const {
#pragma unroll
        for (int i = 0; i < FourteenPair / 4; ++i)
            m3em::store<4>(to + 4 * i, unit[i]);
    }
    __device__ float operator[](int i) const { return widen(unit[i / 4].at[i % 4]); }
    __device__ void cell(int k, float *four) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            four[i] = (*this)[place_in_lines(k, i)];
    }
    __device__ void set(int i, float x) { unit[i / 4].at[i % 4] = narrow<T>(x); }
};

// What two lines have in the windows of the third scale: positions 0-4, 4-9 and 9-13 of each.
struct Windows {
    float upper[3], lower[3];
    __device__ Windows() : upper{}, lower{} {}
    // Positions 2k and 2k+1 of a line, and their sum.
    static __device__ void add(int k, float first, float second, float sum, float *to) {
        if (k <= 2)
            to[0] += k < 2 ? sum : first;
        if (k >= 2 && k <= 4)
            to[1] += sum;
        if (k >= 4)
            to[2] += k > 4 ? sum : second;
    }
    // Takes up a cell of the second scale, positions 2k and 2k+1 of both lines; returns their mean.
    __device__ float take(int k, const float *four) {
        const float above = four[0] + four[1], below = four[2] + four[3];
        add(k, four[0], four[1], above, upper), add(k, four[2], four[3], below, lower);
        return 0.25f * (above + below);
    }
    // FourteenLeft words: of both lines, and of the line that one more window takes, the upper one of the third pair
    // and the lower one of the fifth.
    __device__ void leave(int pair, float *to) const {
        float edge[3];
#pragma unroll
        for (int j = 0; j < 3; ++j)
            edge[j] = pair == 2 ? upper[j] : lower[j];
        store<2>(to, Few<float, 2>{upper[0] + lower[0], upper[1] + lower[1]});
        store<2>(to + 2, Few<float, 2>{upper[2] + lower[2], edge[0]});
        store<2>(to + 4, Few<float, 2>{edge[1], edge[2]});
    }
};

// One cell of the third scale.
template <class T>
struct Third {
    static constexpr int Words = FourteenPair * sizeof(T) / 4, Channel = FourteenPairs * Words;
    int at[3]; // words of a channel that its window adds up
    int to;    // words that are free for a result
    float share;
    __device__ explicit Third(int cell) {
        const int i = cell / 3, j = cell - 3 * i;
#pragma unroll
        for (int k = 0; k < 3; ++k)
            at[k] = (2 * i + k) * Words + j;
        if (i == 0)
            at[2] += 3;
        if (i == 2)
            at[0] += 3;
        to = i * Words + FourteenLeft + j;
        share = 1.0f / float((i == 1 ? 6 : 5) * (j == 1 ? 6 : 5));
    }
    __device__ float mean(const float *channel) const {
        return (channel[at[0]] + channel[at[1]] + channel[at[2]]) * share;
    }
};

} // namespace
} // namespace m3em
