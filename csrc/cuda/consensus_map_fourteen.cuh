// consensus_map of 14x14 maps at three scales, contiguous or channels_last.
//
// A thread has two lines of a channel, 28 numbers, and in every step the same two: 126 threads are eighteen channels.
// Two lines are seven units of four numbers. Seven is odd, so threads that read their lines side by side meet no bank
// twice. The sums of the 28 positions stay in a thread's registers, and so do those of seven cells of the second scale,
// of 2x2 positions each. Windows of the third scale take five lines or six and overlap in one: each is made of what
// three threads leave behind, two whole pairs of lines and a third one, or the one line of it that the window takes.
#pragma once

#include "cuda/consensus_map_last.cuh"
#include "cuda/consensus_map_lines.cuh"
#include "cuda/scales.cuh"
#include "cuda/sums.cuh"

namespace m3em {
namespace {

// The steps of a tile out of channels_last memory are pairs of channels.
template <class T, int Channels>
using FourteenLast = LastTile<T, 14, Channels, 2>;

// Sums of one chunk of one sample.
template <class T>
__device__ void partial_fourteen(const ConsensusMapArguments &m) {
    constexpr int Tile = fourteen_tile(sizeof(T));
    M3EM_SHARED(memory);
    T *const tile_a = reinterpret_cast<T *>(memory), *const tile_b = tile_a + Tile * FourteenPositions;
    const int tid = threadIdx.x, pair = tid % FourteenPairs, group = tid % FourteenLanes;
    const Part part(m.chunk, m.chunks, m.d);
    const bool second = of_second_map(), last = are_last(m);
    const T *from = sample_of<const T>(second ? m.b : m.a, part.n, part.c0);
    T *const copied = second ? tile_b : tile_a;
    const Third<T> third(tid / FourteenLanes);
    float own[3][FourteenOwn] = {}; // a*b, a*a, b*b
    Sums<float> of_third;
    of_third.clear();
#pragma unroll 1
    for (int first = 0; first < part.count; first += Tile) {
        const int channels = part.count - first < Tile ? part.count - first : Tile;
        if (first)
            __syncthreads();
        if (last)
            FourteenLast<T, Tile>::load(m, part.n, part.c0 + first, channels, tile_a, tile_b);
        else
            each_pack_of_half<T, Tile>(channels, [&](int i) { copy_pack(copied + i, from + i); });
        from += Tile * FourteenPositions;
        await_copies();
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < channels; step += FourteenStep) {
            const bool there = tid < FourteenActive && step + tid / FourteenPairs < channels;
            T *const of_a = tile_a + step * FourteenPositions + tid * FourteenPair;
            T *const of_b = tile_b + step * FourteenPositions + tid * FourteenPair;
            Windows windows_a, windows_b;
            if (there) {
                Lines<T> lines_a, lines_b;
                lines_a.load(of_a), lines_b.load(of_b);
                const auto add = [&](int i, float va, float vb) {
                    own[0][i] += va * vb, own[1][i] += va * va, own[2][i] += vb * vb;
                };
#pragma unroll
                for (int k = 0; k < 7; ++k) {
                    float four_a[4], four_b[4];
                    lines_a.cell(k, four_a), lines_b.cell(k, four_b);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        add(place_in_lines(k, i), four_a[i], four_b[i]);
                    add(FourteenPair + k, windows_a.take(k, four_a), windows_b.take(k, four_b));
                }
            }
            // In the place of lines that only their thread reads; __syncwarp is for the compiler, which may take
            // numbers of another type for other memory.
            __syncwarp(0xffffffffu);
            if (there) {
                windows_a.leave(pair, reinterpret_cast<float *>(of_a));
                windows_b.leave(pair, reinterpret_cast<float *>(of_b));
            }
        }
        __syncthreads();
        if (tid < FourteenThird * FourteenLanes)
#pragma unroll 1
            for (int c = group; c < channels; c += FourteenLanes) {
                const float va = third.mean(reinterpret_cast<const float *>(tile_a) + c * Third<T>::Channel);
                const float vb = third.mean(reinterpret_cast<const float *>(tile_b) + c * Third<T>::Channel);
                of_third.ab += va * vb, of_third.aa += va * va, of_third.bb += vb * vb;
            }
    }
    // What threads have, side by side: [channel of a step][pair][its own], and of the third scale [cell][lane][3].
    // Then the sums as they are stored.
    float *const all = reinterpret_cast<float *>(memory), *const thirds = all + FourteenActive * FourteenOwn;
    float *const sums = thirds + 3 * FourteenThird * FourteenLanes;
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        __syncthreads();
        if (tid < FourteenActive)
#pragma unroll
            for (int i = 0; i < FourteenOwn; ++i)
                all[tid * FourteenOwn + i] = own[e][i];
        if (e == 0 && tid < FourteenThird * FourteenLanes)
            thirds[3 * tid] = of_third.ab, thirds[3 * tid + 1] = of_third.aa, thirds[3 * tid + 2] = of_third.bb;
        __syncthreads();
#pragma unroll 1
        for (int item = tid; item < FourteenPairs * FourteenOwn; item += FourteenThreads) {
            const int of = item / FourteenOwn, i = item - of * FourteenOwn;
            float sum = 0;
#pragma unroll
            for (int c = 0; c < FourteenStep; ++c)
                sum += all[c * FourteenPairs * FourteenOwn + item];
            const int cell = i < FourteenPair ? of * FourteenPair + i : FourteenPositions + of * 7 + i - FourteenPair;
            sums[3 * cell + e] = sum;
        }
        if (e == 0 && tid < 3 * FourteenThird) {
            const int cell = tid / 3;
            float sum = 0;
#pragma unroll
            for (int lane = 0; lane < FourteenLanes; ++lane)
                sum += thirds[3 * (cell * FourteenLanes + lane) + tid - 3 * cell];
            sums[3 * (FourteenPositions + FourteenSecond) + tid] = sum;
        }
    }
    __syncthreads();
    float *const to = static_cast<float *>(m.partial) + (long long)blockIdx.x * 3 * FourteenCells;
    for (int i = tid; i < 3 * FourteenCells; i += FourteenThreads)
        to[i] = sums[i];
}

// As make_factors in consensus_map.cu, which says what they are. `across`: over the columns of every line, 7 + 3
// numbers.
template <class T>
__device__ void make_fourteen_factors(const ConsensusMapArguments &m, long long n, float *grad, float *across,
                                      float *factors) {
    const int tid = threadIdx.x;
    const float *stats = static_cast<const float *>(m.stats) + n * 3 * FourteenCells;
    load_grad<T>(m, n, 14, 14, FourteenThreads, grad);
    for (int i = tid; i < 3 * FourteenCells; i += FourteenThreads)
        factors[i] = stats[i];
    __syncthreads();
    // What a cell of the second scale, of the third one, has of fourteen numbers.
    const auto of_seven = [](const float *from, int step, int cell) {
        const int before = cell > 0 ? 2 * cell - 1 : 0, after = cell < 6 ? 2 * cell + 2 : 13;
        return 0.75f * (from[2 * cell * step] + from[(2 * cell + 1) * step]) +
               0.25f * (from[before * step] + from[after * step]);
    };
    const auto of_three = [](const float *from, int step, int cell) {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < 14; ++p)
            if (const float weight = Taps<float>(p, 14, 3).of(cell); weight != 0)
                sum += weight * from[p * step];
        return sum;
    };
    float *const second = across, *const third = across + 14 * 7;
#pragma unroll 1
    for (int i = tid; i < 14 * 7 + 14 * 3; i += FourteenThreads)
        if (const int j = i - 14 * 7; j < 0)
            second[i] = of_seven(grad + i / 7 * 14, 1, i % 7);
        else
            third[j] = of_three(grad + j / 3 * 14, 1, j % 3);
    __syncthreads();
#pragma unroll 1
    for (int cell = tid; cell < FourteenCells; cell += FourteenThreads) {
        float sum = 0;
        if (const int i = cell - FourteenPositions, j = i - FourteenSecond; i < 0)
            sum = grad[cell];
        else if (j < 0)
            sum = 0.25f * of_seven(second + i % 7, 7, i / 7);
        else
            sum = of_three(third + j % 3, 3, j / 3) * Third<T>(j).share;
        float *const three = factors + 3 * cell;
        const bool dead = three[0] == 0 && three[1] == 0 && three[2] == 0;
#pragma unroll
        for (int e = 0; e < 3; ++e)
            three[e] = dead ? 0.0f : sum * three[e];
    }
    __syncthreads();
}

// The gradients that arrive from the third scale at two lines: from the row of windows that takes both, and from one
// that takes only the upper line of the third pair or the lower one of the fifth.
struct Arriving {
    float both[3], more[3];
    const bool above, below;
    __device__ explicit Arriving(int pair) : both{}, more{}, above(pair == 2), below(pair == 4) {}
    // From where Third::to points in a channel.
    __device__ void load(const float *channel, int words, int pair) {
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            both[j] = channel[(pair + 1) / 3 * words + FourteenLeft + j];
            more[j] = above || below ? channel[(above ? 0 : 2) * words + FourteenLeft + j] : 0.0f;
        }
    }
    // At a position, which is held by one window along the line or by two.
    __device__ float at(int i) const {
        const int x = i % 14, first = x < 5 ? 0 : x < 10 ? 1 : 2;
        return x == 4 || x == 9 ? of(i, x / 4 - 1) + of(i, x / 4) : of(i, first);
    }

private:
    __device__ float of(int i, int j) const { return (i < 14 ? above : below) ? both[j] + more[j] : both[j]; }
};

template <class T>
__device__ void backward_fourteen(const ConsensusMapArguments &m) {
    constexpr int Tile = FourteenStep, Words = Third<T>::Words;
    M3EM_SHARED(memory);
    T *const tile_a = reinterpret_cast<T *>(memory), *const tile_b = tile_a + Tile * FourteenPositions;
    float *const factors = reinterpret_cast<float *>(tile_b + Tile * FourteenPositions);
    float *const grad = factors + 3 * FourteenCells;
    const int tid = threadIdx.x, mine = tid / FourteenPairs, pair = tid - mine * FourteenPairs;
    const int cell = tid / FourteenLanes;
    const Third<T> third(cell);
    const Part part(m.chunk, m.chunks, m.d);
    const bool second = of_second_map(), last = are_last(m);
    const Map &map = second ? m.b : m.a, &gradient = second ? m.grad_b : m.grad_a;
    const T *from = sample_of<const T>(map, part.n, part.c0);
    T *to = gradient.data ? sample_of<T>(gradient, part.n, part.c0) : nullptr;
    T *const copied = second ? tile_b : tile_a;
    T *const of_a = tile_a + tid * FourteenPair, *const of_b = tile_b + tid * FourteenPair;
    const float *const own = factors + 3 * FourteenPair * pair;
    const float *const own_second = factors + 3 * (FourteenPositions + 7 * pair);
#pragma unroll 1
    for (int first = 0; first < part.count; first += Tile) {
        const int channels = part.count - first < Tile ? part.count - first : Tile;
        const bool there = tid < FourteenActive && mine < channels;
        if (last)
            FourteenLast<T, Tile>::load(m, part.n, part.c0 + first, channels, tile_a, tile_b);
        else
            each_pack_of_half<T, Tile>(channels, [&](int i) { copy_pack(copied + i, from + i); });
        if (first == 0) // while the tiles are on their way
            make_fourteen_factors<T>(m, part.n, grad, grad + FourteenPositions, factors);
        await_copies();
        __syncthreads();
        Lines<T> lines_a, lines_b;
        float second_a[7], second_b[7]; // gradients by the cells of the second scale
        Windows windows_a, windows_b;
        if (there) {
            lines_a.load(of_a), lines_b.load(of_b);
#pragma unroll
            for (int k = 0; k < 7; ++k) {
                float four_a[4], four_b[4];
                lines_a.cell(k, four_a), lines_b.cell(k, four_b);
                const float va = windows_a.take(k, four_a), vb = windows_b.take(k, four_b);
                const float *f = own_second + 3 * k;
                second_a[k] = f[0] * vb - f[1] * va, second_b[k] = f[0] * va - f[2] * vb;
            }
        }
        __syncwarp(0xffffffffu); // as in the forward
        if (there) {
            windows_a.leave(pair, reinterpret_cast<float *>(of_a));
            windows_b.leave(pair, reinterpret_cast<float *>(of_b));
        }
        __syncthreads();
        float *const words_a = reinterpret_cast<float *>(tile_a), *const words_b = reinterpret_cast<float *>(tile_b);
        if (cell < FourteenThird)
#pragma unroll 1
            for (int c = tid - cell * FourteenLanes; c < channels; c += FourteenLanes) {
                float *const at_a = words_a + c * Third<T>::Channel, *const at_b = words_b + c * Third<T>::Channel;
                const float *f = factors + 3 * (FourteenPositions + FourteenSecond + cell);
                const float va = third.mean(at_a), vb = third.mean(at_b);
                at_a[third.to] = f[0] * vb - f[1] * va, at_b[third.to] = f[0] * va - f[2] * vb;
            }
        __syncthreads();
        Arriving arriving_a(pair), arriving_b(pair);
        if (there) {
            arriving_a.load(words_a + mine * Third<T>::Channel, Words, pair);
            arriving_b.load(words_b + mine * Third<T>::Channel, Words, pair);
        }
        __syncthreads();
        if (there) {
            Few<float, 4> f[3]; // the factors of four positions
#pragma unroll
            for (int i = 0; i < FourteenPair; ++i) {
                if (i % 4 == 0)
#pragma unroll
                    for (int e = 0; e < 3; ++e)
                        f[e] = load<4>(own + 3 * i + 4 * e);
                const auto factor = [&](int e) { return f[(i % 4 * 3 + e) / 4].at[(i % 4 * 3 + e) % 4]; };
                const float va = lines_a[i], vb = lines_b[i];
                const int k = i % 14 / 2;
                lines_a.set(i, factor(0) * vb - factor(1) * va + (second_a[k] + arriving_a.at(i)));
                lines_b.set(i, factor(0) * va - factor(2) * vb + (second_b[k] + arriving_b.at(i)));
            }
            lines_a.store(of_a), lines_b.store(of_b);
        }
        __syncthreads();
        // The next tile is copied to where the same thread reads now.
        constexpr int Wide = 16 / sizeof(T);
        if (last)
            FourteenLast<T, Tile>::store(m, part.n, part.c0 + first, channels, tile_a, tile_b);
        else if (to)
            each_pack_of_half<T, Tile>(channels, [&](int i) { store<Wide>(to + i, load<Wide>(copied + i)); });
        from += Tile * FourteenPositions, to = to ? to + Tile * FourteenPositions : nullptr;
    }
}

} // namespace
} // namespace m3em
