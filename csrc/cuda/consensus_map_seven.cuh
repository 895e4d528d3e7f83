// consensus_map of 7x7 maps at three scales, contiguous or channels_last: the maps of the field's backbones.
//
// What limits a card here is what it does for a number, not only the bytes. A tile of channels comes 16 bytes at a time
// and lies in shared memory channel by channel. Each thread meets the same positions in every step (walkers() in
// cuda/arguments.cuh), so the sums of the positions stay in its registers. Pooling is done by rows of 49 words, a
// channel of float or two of half, one thread a row: 49 is odd, so no bank is met twice, and every pooled value is made
// with additions alone. In the backward the same threads turn a row's pooled gradients into the 25 sums that its 49
// positions can need.
#pragma once

#include "cuda/async.cuh"
#include "cuda/consensus_map_last.cuh"
#include "cuda/scales.cuh"
#include "cuda/slab.cuh"
#include "cuda/sums.cuh"

namespace m3em {
namespace {

constexpr int SevenPooled = 10; // cells of the second and third scale: 3x3 and one
// Positions are held by one cell of three or by two neighbours, along either side: five ways.
constexpr int SevenWays = 5;

template <class T>
struct Seven {
    static constexpr int Wide = 16 / sizeof(T);
    static constexpr int Channels = 4 / sizeof(T); // of a row
    static constexpr int Active = walkers(SevenThreads, SevenPositions, Wide);
    static constexpr int Step = Active * Wide / SevenPositions; // channels that the threads take together
    static constexpr int StepRows = Step / Channels;
    static constexpr int RowNumbers = Channels * SevenPositions; // of T
};

// body(step, where the pack begins) for every pack of this thread in a tile of `packs`, at most Rows rows.
template <class T, int Rows, class Body>
__device__ inline void each_pack(int packs, const Body &body) {
    using S = Seven<T>;
    constexpr int Steps = Rows / S::StepRows;
    static_assert(Steps * S::StepRows == Rows, "a tile is whole steps");
    if (int(threadIdx.x) >= S::Active)
        return;
    if (packs == Steps * S::Active) {
#pragma unroll
        for (int s = 0; s < Steps; ++s)
            body(s, (int(threadIdx.x) + s * S::Active) * S::Wide);
    } else {
#pragma unroll 1
        for (int s = 0; int(threadIdx.x) + s * S::Active < packs; ++s)
            body(s, (int(threadIdx.x) + s * S::Active) * S::Wide);
    }
}

template <class T, int Rows>
using SevenLast = LastTile<T, 7, Rows * Seven<T>::Channels, Seven<T>::Wide>;

// Both maps to shared memory.
template <class T, int Rows>
__device__ inline void copy_tiles(const T *a, const T *b, T *tile_a, T *tile_b, int packs) {
    each_pack<T, Rows>(packs, [&](int, int i) {
        copy_pack(tile_a + i, a + i);
        copy_pack(tile_b + i, b + i);
    });
}

// The pooled values of the channels of a row.
template <class T>
__device__ inline void pool_row(const T *row, float (*cells)[SevenPooled]) {
    constexpr int Channels = Seven<T>::Channels;
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
        float *cell = cells[c];
#pragma unroll
        for (int i = 0; i < SevenPooled; ++i)
            cell[i] = 0;
#pragma unroll
        for (int y = 0; y < 7; ++y) {
            float at[7], window[3];
#pragma unroll
            for (int x = 0; x < 7; ++x) {
                const int i = c * SevenPositions + y * 7 + x;
                at[x] = widen(load<Channels>(row + i / Channels * Channels).at[i % Channels]);
            }
#pragma unroll
            for (int j = 0; j < 3; ++j)
                window[j] = at[2 * j] + at[2 * j + 1] + at[2 * j + 2];
#pragma unroll
            for (int i = 0; i < 3; ++i)
                if (y >= window_start(i, 7, 3) && y < window_stop(i, 7, 3))
#pragma unroll
                    for (int j = 0; j < 3; ++j)
                        cell[3 * i + j] += window[j];
            // The first and the last window and the column between them are the whole line.
            cell[9] += window[0] + at[3] + window[2];
        }
#pragma unroll
        for (int i = 0; i < SevenPooled; ++i)
            cell[i] *= i < 9 ? 1.0f / 9 : 1.0f / SevenPositions;
    }
}

// Sums of one chunk of one sample.
template <class T>
__device__ void partial_seven(const ConsensusMapArguments &m) {
    using S = Seven<T>;
    constexpr int Warps = SevenThreads / 32, Turns = (SevenPooled + Warps - 1) / Warps;
    constexpr int Tile = SevenForwardRows * S::Channels;
    M3EM_SHARED(memory);
    T *const tile_a = reinterpret_cast<T *>(memory), *const tile_b = tile_a + Tile * SevenPositions;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const Part part(m.chunk, m.chunks, m.d);
    const T *a = sample_of<const T>(m.a, part.n, part.c0), *b = sample_of<const T>(m.b, part.n, part.c0);
    const bool last = are_last(m);
    float own[3][S::Wide] = {}; // a*b, a*a, b*b at this thread's positions
    Sums<float> pooled[Turns];  // of this lane's rows, for every fourth cell
#pragma unroll
    for (int i = 0; i < Turns; ++i)
        pooled[i].clear();
#pragma unroll 1
    for (int first = 0; first < part.count; first += Tile) {
        const int channels = part.count - first < Tile ? part.count - first : Tile, rows = channels / S::Channels;
        const int packs = channels * SevenPositions / S::Wide;
        if (first)
            __syncthreads();
        if (last) {
            SevenLast<T, SevenForwardRows>::load(m, part.n, part.c0 + first, channels, tile_a, tile_b);
            __syncthreads();
        } else {
            const long long from = (long long)first * SevenPositions;
            copy_tiles<T, SevenForwardRows>(a + from, b + from, tile_a, tile_b, packs);
            await_copies();
        }
        each_pack<T, SevenForwardRows>(packs, [&](int, int i) { // contiguous: what the thread has copied itself
            const Few<T, S::Wide> of_a = load<S::Wide>(tile_a + i), of_b = load<S::Wide>(tile_b + i);
#pragma unroll
            for (int e = 0; e < S::Wide; ++e) {
                const float va = widen(of_a.at[e]), vb = widen(of_b.at[e]);
                own[0][e] += va * vb, own[1][e] += va * va, own[2][e] += vb * vb;
            }
        });
        __syncthreads();
        // The rows of both maps follow each other. Pooled values take the place of the row that only their thread
        // reads; __syncwarp is for the compiler, which may take numbers of another type for other memory.
        const bool there = tid % SevenForwardRows < rows;
        T *const row = tile_a + tid * S::RowNumbers;
        float cells[S::Channels][SevenPooled];
        if (there)
            pool_row(row, cells);
        __syncwarp(0xffffffffu);
        if (there)
#pragma unroll
            for (int c = 0; c < S::Channels; ++c)
#pragma unroll
                for (int i = 0; i < SevenPooled; ++i)
                    reinterpret_cast<float *>(row)[c * SevenPooled + i] = cells[c][i];
        __syncthreads();
#pragma unroll
        for (int turn = 0; turn < Turns; ++turn)
            if (const int cell = warp + turn * Warps; cell < SevenPooled)
                for (int r = lane; r < rows; r += 32)
#pragma unroll
                    for (int c = 0; c < S::Channels; ++c) {
                        const int at = r * SevenPositions + c * SevenPooled + cell;
                        const float va = reinterpret_cast<const float *>(tile_a)[at];
                        const float vb = reinterpret_cast<const float *>(tile_b)[at];
                        pooled[turn].ab += va * vb, pooled[turn].aa += va * va, pooled[turn].bb += vb * vb;
                    }
    }
    // What threads and lanes have, side by side: [3][channels of a step][positions], and [pooled cells][3][lanes].
    constexpr int Pitch = odd(32);
    float *const all = reinterpret_cast<float *>(memory), *const lanes = all + 3 * S::Active * S::Wide;
    __syncthreads();
    if (tid < S::Active)
#pragma unroll
        for (int i = 0; i < 3; ++i)
#pragma unroll
            for (int e = 0; e < S::Wide; e += 4)
                store<4>(all + (i * S::Active + tid) * S::Wide + e,
                         Few<float, 4>{own[i][e], own[i][e + 1], own[i][e + 2], own[i][e + 3]});
#pragma unroll
    for (int turn = 0; turn < Turns; ++turn)
        if (const int cell = warp + turn * Warps; cell < SevenPooled) {
            float *const here = lanes + 3 * cell * Pitch + lane;
            here[0] = pooled[turn].ab, here[Pitch] = pooled[turn].aa, here[2 * Pitch] = pooled[turn].bb;
        }
    __syncthreads();
    float *const to = static_cast<float *>(m.partial) + (long long)blockIdx.x * 3 * (SevenPositions + SevenPooled);
#pragma unroll 1
    for (int item = tid; item < 3 * (SevenPositions + SevenPooled); item += SevenThreads) {
        const int i = item / SevenPositions, q = item - i * SevenPositions;
        float sum = 0;
        if (i < 3) {
#pragma unroll
            for (int c = 0; c < S::Step; ++c)
                sum += all[(i * S::Step + c) * SevenPositions + q];
            to[3 * q + i] = sum;
        } else {
#pragma unroll
            for (int k = 0; k < 32; ++k)
                sum += lanes[(item - 3 * SevenPositions) * Pitch + k];
            to[item] = sum;
        }
    }
}

// As make_factors in consensus_map.cu, which says what they are, with the transpose of the upsampling side by side.
template <class T>
__device__ void make_seven_factors(const ConsensusMapArguments &m, long long n, float *grad, float *across,
                                   float *factors) {
    const int tid = threadIdx.x;
    const float *stats = static_cast<const float *>(m.stats) + n * 3 * (SevenPositions + SevenPooled);
    float three[3] = {};
    if (tid < SevenPositions + SevenPooled)
#pragma unroll
        for (int e = 0; e < 3; ++e)
            three[e] = stats[3 * tid + e];
    load_grad<T>(m, n, 7, 7, SevenThreads, grad);
    __syncthreads();
    const auto weigh = [](const float *from, int step, int cell) {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < 7; ++p)
            if (const float weight = Taps<float>(p, 7, 3).of(cell); weight != 0)
                sum += weight * from[p * step];
        return sum;
    };
    if (tid < 7 * 3)
        across[tid] = weigh(grad + tid / 3 * 7, 1, tid % 3);
    __syncthreads();
    if (tid < SevenPositions + SevenPooled) {
        float sum = 0;
        if (tid < SevenPositions)
            sum = grad[tid];
        else if (const int cell = tid - SevenPositions; cell < 9)
            sum = weigh(across + cell % 3, 3, cell / 3) * (1.0f / 9);
        else {
#pragma unroll
            for (int q = 0; q < SevenPositions; ++q)
                sum += grad[q];
            sum *= 1.0f / SevenPositions;
        }
        const bool dead = three[0] == 0 && three[1] == 0 && three[2] == 0;
#pragma unroll
        for (int e = 0; e < 3; ++e)
            factors[3 * tid + e] = dead ? 0.0f : sum * three[e];
    }
    __syncthreads();
}

// The way of a position along one side: cells way/2 .. (way+1)/2 of three hold it.
__device__ inline int way_of(int p) { return holder_first(p, 7, 3) + holder_last(p, 7, 3) - 1; }

// What the gradients of a channel's pooled values add up to at its positions, by their ways along both sides.
__device__ inline void spread(const float *cells, float *to) {
    float across[3][SevenWays];
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
        for (int way = 0; way < SevenWays; ++way) {
            const int j = way / 2;
            across[i][way] = cells[3 * i + j] + (way % 2 ? cells[3 * i + j + 1] : 0.0f);
        }
#pragma unroll
    for (int way = 0; way < SevenWays; ++way)
#pragma unroll
        for (int other = 0; other < SevenWays; ++other) {
            const int i = way / 2;
            const float with_all = across[i][other] + cells[9];
            to[way * SevenWays + other] = way % 2 ? with_all + across[i + 1][other] : with_all;
        }
}

template <class T>
__device__ void backward_seven(const ConsensusMapArguments &m) {
    using S = Seven<T>;
    constexpr int Rows = SevenBackwardRows, Tile = Rows * S::Channels;
    static_assert(2 * Rows % 32 == 0, "whole warps pool");
    constexpr int Spread = SevenWays * SevenWays, Pitch = seven_pitch(S::Channels);
    M3EM_SHARED(memory);
    T *const tile_a = reinterpret_cast<T *>(memory);
    T *const tile_b = tile_a + (Rows * SevenPositions + SevenGap) * S::Channels;
    float *const spread_a = reinterpret_cast<float *>(tile_b + Tile * SevenPositions);
    float *const spread_b = spread_a + Rows * Pitch + SevenGap;
    float *const factors = spread_b + Rows * Pitch, *const grad = factors + 3 * (SevenPositions + SevenPooled);
    const int tid = threadIdx.x;
    const Part part(m.chunk, m.chunks, m.d);
    const T *a = sample_of<const T>(m.a, part.n, part.c0), *b = sample_of<const T>(m.b, part.n, part.c0);
    const bool last = are_last(m);
#pragma unroll 1
    for (int first = 0; first < part.count; first += Tile) {
        const int channels = part.count - first < Tile ? part.count - first : Tile, rows = channels / S::Channels;
        const int packs = channels * SevenPositions / S::Wide;
        const long long from = (long long)first * SevenPositions;
        if (last)
            SevenLast<T, Rows>::load(m, part.n, part.c0 + first, channels, tile_a, tile_b);
        else
            copy_tiles<T, Rows>(a + from, b + from, tile_a, tile_b, packs);
        if (first == 0) // while the tiles are on their way
            make_seven_factors<T>(m, part.n, grad, grad + SevenPositions, factors);
        await_copies();
        __syncthreads();
        if (tid < 2 * Rows) {
            // Neighbouring lanes take the same row of both maps.
            const int row = tid / 2, second = tid % 2;
            const bool there = row < rows;
            float cells[S::Channels][SevenPooled] = {};
            if (there)
                pool_row((second ? tile_b : tile_a) + row * S::RowNumbers, cells);
#pragma unroll
            for (int c = 0; c < S::Channels; ++c)
#pragma unroll
                for (int i = 0; i < SevenPooled; ++i) {
                    const float *f = factors + 3 * (SevenPositions + i);
                    const float other = __shfl_xor_sync(0xffffffffu, cells[c][i], 1);
                    cells[c][i] = f[0] * other - f[1 + second] * cells[c][i];
                }
            if (there)
#pragma unroll
                for (int c = 0; c < S::Channels; ++c)
                    spread(cells[c], (second ? spread_b : spread_a) + row * Pitch + c * Spread);
        }
        __syncthreads();
        int ways[S::Wide];
        float f[3][S::Wide];
#pragma unroll
        for (int e = 0; e < S::Wide; ++e) {
            const int i = tid * S::Wide + e, c = i / SevenPositions, q = i - c * SevenPositions, y = q / 7;
            ways[e] = c / S::Channels * Pitch + c % S::Channels * Spread + way_of(y) * SevenWays + way_of(q - y * 7);
            f[0][e] = factors[3 * q], f[1][e] = factors[3 * q + 1], f[2][e] = factors[3 * q + 2];
        }
        T *const grad_a = m.grad_a.data ? sample_of<T>(m.grad_a, part.n, part.c0) + from : nullptr;
        T *const grad_b = m.grad_b.data ? sample_of<T>(m.grad_b, part.n, part.c0) + from : nullptr;
        each_pack<T, Rows>(packs, [&](int s, int i) {
            const Few<T, S::Wide> of_a = load<S::Wide>(tile_a + i), of_b = load<S::Wide>(tile_b + i);
            Few<T, S::Wide> made_a, made_b;
#pragma unroll
            for (int e = 0; e < S::Wide; ++e) {
                const float va = widen(of_a.at[e]), vb = widen(of_b.at[e]);
                const int at = ways[e] + s * S::StepRows * Pitch;
                made_a.at[e] = narrow<T>(f[0][e] * vb - f[1][e] * va + spread_a[at]);
                made_b.at[e] = narrow<T>(f[0][e] * va - f[2][e] * vb + spread_b[at]);
            }
            if (last) {
                store<S::Wide>(tile_a + i, made_a), store<S::Wide>(tile_b + i, made_b);
                return;
            }
            if (grad_a)
                store<S::Wide>(grad_a + i, made_a);
            if (grad_b)
                store<S::Wide>(grad_b + i, made_b);
        });
        if (last) { // the next tile comes to where the same thread reads now
            __syncthreads();
            SevenLast<T, Rows>::store(m, part.n, part.c0 + first, channels, tile_a, tile_b);
        }
    }
}

} // namespace
} // namespace m3em
