// consensus_map on a card: all scales in one pass over the channels.
//
// A block takes one chunk of the channels of one sample, tile after tile: a and b of the tile go to shared memory once,
// the pooled values of every scale are made there, and one thread per cell (a position of some scale) adds up a*b, a*a
// and b*b over the channels. A second, small kernel adds the chunks in their order, takes the cosines and upsamples
// them. The backward reads a and b once more, with three numbers a cell that the forward left:
//
//     d cos / d a  =  inv * b - ratio_a * a,     inv = 1 / (|a| |b|),  ratio_a = cos / |a|^2.
//
// These are the kernels for any map (the form `any`); those for 7x7 and 14x14 are in consensus_map_seven.cuh and
// consensus_map_fourteen.cuh. Chunks and tiles depend on D, H, W, the dtype and the form alone, and every sum has one
// order, so a sample's result does not depend on the others in the batch nor on the card. The form follows from sizes,
// dtype, strides and addresses.
#include "cuda/consensus_map.cuh"
#include "cuda/consensus_map_fourteen.cuh"
#include "cuda/consensus_map_seven.cuh"
#include "cuda/consensus_map_tile.cuh"
#include "cuda/device.cuh"
#include "cuda/scales.cuh"
#include "cuda/sums.cuh"

namespace m3em {
namespace {

// How `count` channels are shared by groups that take one after another in turn.
struct Split {
    int each, more; // the first groups have one more
    __device__ Split(int count, int groups) : each(count / groups), more(count - each * groups) {}
    __device__ int of(int group) const { return each + (group < more); }
};

// Sums of one chunk of one sample.
template <class T>
__device__ void partial(const ConsensusMapArguments &m) {
    using A = typename acc_of<T>::type;
    const Geometry<0, 0, 0> g(m);
    M3EM_SHARED(memory);
    const Room<T, A> room(g, m.tile, 0, memory);
    const bool center = m.center;
    const int per_cell = SumsOf(center), tid = threadIdx.x;
    const Part part(m.chunk, m.chunks, m.d);
    const int c0 = part.c0, c1 = c0 + part.count;
    // Where there are more threads than cells, groups of threads share the channels of a tile.
    const int groups = MapThreads / g.cells > 1 ? MapThreads / g.cells : 1;
    const int group = tid / g.cells, stride = groups > 1 ? g.cells : MapThreads;
    A *const sums = room.rest; // [group][cell][per_cell], each cell of a group one thread's own
    for (int i = tid; i < groups * g.cells * per_cell; i += MapThreads)
        sums[i] = 0;
    room.make_windows(g);
    const Divisors<T> divided(g.positions, m.tile);
    const int whole = Split(m.tile, groups).of(group); // channels of a tile that this thread's group has
    int done = 0;                                      // channels of this thread's group so far
    for (int c = c0; c < c1; c += m.tile) {
        const int count = c1 - c < m.tile ? c1 - c : m.tile;
        __syncthreads();
        load_tile(m.a, divided, part.n, c, m.d, m.tile, count, g.h, g.w, room.pitch, room.a);
        load_tile(m.b, divided, part.n, c, m.d, m.tile, count, g.h, g.w, room.pitch, room.b);
        await_copies();
        __syncthreads();
        pool_tiles<false>(g, room, count, static_cast<const A *>(nullptr));
        __syncthreads();
        if (group >= groups)
            continue;
        const int mine = count == m.tile ? whole : Split(count, groups).of(group);
        const Share<A> share = center ? Share<A>(done, mine) : Share<A>(0, 0);
        const A one = center && mine ? A(1) / A(mine) : A(0);
        const auto add = [&](int cell, int step, const auto *a, const auto *b) {
            Sums<A> here;
            here.clear();
            if (center && mine) {
                for (int i = 0; i < mine; ++i)
                    here.mean_a += A(widen(a[i * step])), here.mean_b += A(widen(b[i * step]));
                here.mean_a *= one, here.mean_b *= one;
            }
#pragma unroll 4
            for (int i = 0; i < mine; ++i) {
                const A va = A(widen(a[i * step])) - here.mean_a, vb = A(widen(b[i * step])) - here.mean_b;
                here.ab += va * vb, here.aa += va * va, here.bb += vb * vb;
            }
            A *const own = sums + (group * g.cells + cell) * per_cell;
            Sums<A> before;
            before.load(own, center);
            before.merge(here, share, center);
            before.store(own, center);
        };
#pragma unroll 1
        for (int cell = groups > 1 ? tid - group * g.cells : tid; cell < g.cells; cell += stride)
            if (cell < g.positions) {
                const int at = group * room.pitch + cell;
                add(cell, groups * room.pitch, room.a + at, room.b + at);
            } else {
                const int at = group * room.pooled_pitch + cell - g.positions;
                add(cell, groups * room.pooled_pitch, room.pooled_a + at, room.pooled_b + at);
            }
        done += mine;
    }
    __syncthreads();
    // The groups in their order. How many channels each had follows from the tiles.
    A *to = static_cast<A *>(m.partial) + (long long)blockIdx.x * g.cells * per_cell;
    const int tiles = part.count / m.tile;
    const Split in_tile(m.tile, groups), in_last(part.count - tiles * m.tile, groups);
#pragma unroll 1
    for (int cell = tid; cell < g.cells; cell += MapThreads) {
        Sums<A> total, other;
        total.clear();
        int channels = 0;
#pragma unroll 1
        for (int i = 0; i < groups; ++i) {
            const int more = tiles * in_tile.of(i) + in_last.of(i);
            other.load(sums + (i * g.cells + cell) * per_cell, center);
            total.merge(other, center ? Share<A>(channels, more) : Share<A>(0, 0), center);
            channels += more;
        }
        total.store(to + cell * per_cell, center);
    }
}

// Of one sample: the chunks together, the cosines, their upsampling, and what the backward will need.
template <class T, int Threads, int H0 = 0, int W0 = 0, int S0 = 0>
__device__ void finish(const ConsensusMapArguments &m) {
    using A = typename acc_of<T>::type;
    const Geometry<H0, W0, S0> g(m);
    M3EM_SHARED(memory);
    A *cosine = reinterpret_cast<A *>(memory);
    const bool center = m.center;
    const int per_cell = SumsOf(center), tid = threadIdx.x;
    const long long n = blockIdx.x;
    A *stats = m.stats ? static_cast<A *>(m.stats) + n * (3 * g.cells + (center ? 2 * g.positions : 0)) : nullptr;
    const A *from = static_cast<const A *>(m.partial) + n * m.chunks * g.cells * per_cell;
#pragma unroll 1
    for (int cell = tid; cell < g.cells; cell += Threads) {
        Sums<A> total, other;
        total.load(from + cell * per_cell, center);
#pragma unroll 1
        for (int i = 1; i < m.chunks; ++i) {
            const int before = i * m.chunk, more = m.d - before < m.chunk ? m.d - before : m.chunk;
            other.load(from + (i * g.cells + cell) * per_cell, center);
            total.merge(other, Share<A>(before, more), center);
        }
        const A norm_a = root(total.aa), norm_b = root(total.bb), eps = A(m.eps);
        // A NaN or an infinity in one map is no small norm, however small the other map is there.
        const bool small = (norm_a < eps || norm_b < eps) && finite(total.aa) && finite(total.bb);
        const A value = small ? A(0) : total.ab / (norm_a * norm_b);
        cosine[cell] = value;
        if (stats) {
            stats[3 * cell] = small ? A(0) : A(1) / (norm_a * norm_b);
            stats[3 * cell + 1] = small ? A(0) : value / total.aa;
            stats[3 * cell + 2] = small ? A(0) : value / total.bb;
            if (center && cell < g.positions) {
                stats[3 * g.cells + cell] = total.mean_a;
                stats[3 * g.cells + g.positions + cell] = total.mean_b;
            }
        }
    }
    __syncthreads();
    const long long first = n * g.positions;
#pragma unroll 1
    for (int q = tid; q < g.positions; q += Threads) {
        const int y = q / g.w, x = q - y * g.w;
        A value = cosine[q];
        for (int k = 1; k < g.scales; ++k) {
            const int columns = g.columns(k);
            const A *cells = cosine + g.first(k);
            const Taps<A> ty(y, g.h, g.rows(k)), tx(x, g.w, columns);
            // A tap of weight 0 is not read: it may hold the NaN of a cell that has no part in this position.
            for (int i = 0; i < (ty.share > 0 ? 2 : 1); ++i)
                for (int j = 0; j < (tx.share > 0 ? 2 : 1); ++j)
                    value += (i ? ty.share : A(1) - ty.share) * (j ? tx.share : A(1) - tx.share) *
                             cells[(i ? ty.high : ty.low) * columns + (j ? tx.high : tx.low)];
        }
        if (m.wide)
            static_cast<A *>(m.out.data)[first + q] = value;
        else
            static_cast<T *>(m.out.data)[first + q] = narrow<T>(value);
    }
}

// The three factors of every cell: the gradient of its cosine (the transpose of the upsampling), for the way back
// through the pooling divided by its window, times the three numbers that the forward left. `across` holds the sums
// over the columns of a row, [row][column of the scale], for one scale at a time.
template <class T, class A, class G>
__device__ void make_factors(const G &g, const ConsensusMapArguments &m, long long n, const A *stats, A *grad,
                             A *across, A *factors) {
    load_grad<T>(m, n, g.h, g.w, MapThreads, grad);
    __syncthreads();
    // The sum of numbers `step` apart by the share that a cell has in each of `length` places; only those near the cell
    // have one.
    const auto weigh = [](const A *from, int step, int cell, int cells, int length) {
        const int first = (2 * cell - 1) * length / (2 * cells) - 1, last = (2 * cell + 3) * length / (2 * cells) + 2;
        A sum = 0;
#pragma unroll 1
        for (int p = first > 0 ? first : 0; p < last && p < length; ++p)
            if (const A weight = Taps<A>(p, length, cells).of(cell); weight != A(0))
                sum += weight * from[p * step];
        return sum;
    };
    const auto write_factors = [&](int cell, A sum) {
        const A *three = stats + 3 * cell;
        // A dead cell passes nothing on, not even of a gradient that is infinite.
        const bool dead = three[0] == 0 && three[1] == 0 && three[2] == 0;
        for (int e = 0; e < 3; ++e)
            factors[3 * cell + e] = dead ? A(0) : sum * three[e];
    };
    for (int q = threadIdx.x; q < g.positions; q += MapThreads)
        write_factors(q, grad[q]);
    for (int k = 1; k < g.scales; ++k) {
        const int rows = g.rows(k), columns = g.columns(k), start = g.first(k);
#pragma unroll 1
        for (int i = threadIdx.x; i < g.h * columns; i += MapThreads)
            across[i] = weigh(grad + i / columns * g.w, 1, i % columns, columns, g.w);
        __syncthreads();
#pragma unroll 1
        for (int at = threadIdx.x; at < rows * columns; at += MapThreads) {
            const A sum = weigh(across + at % columns, columns, at / columns, rows, g.h);
            write_factors(start + at, sum / A(Window(g, start + at).size()));
        }
        __syncthreads();
    }
}

// Which cells hold a row or a column, [scale but the first][rows, then columns].
template <class G>
__device__ void make_holders(const G &g, Holders *holders) {
    for (int i = threadIdx.x; i < (g.scales - 1) * (g.h + g.w); i += MapThreads) {
        const int k = i / (g.h + g.w) + 1, p = i % (g.h + g.w);
        const bool row = p < g.h;
        const int length = row ? g.h : g.w, size = row ? g.rows(k) : g.columns(k), at = row ? p : p - g.h;
        holders[i].first = holder_first(at, length, size), holders[i].last = holder_last(at, length, size);
    }
}

template <class T>
__device__ void backward(const ConsensusMapArguments &m) {
    using A = typename acc_of<T>::type;
    const Geometry<0, 0, 0> g(m);
    M3EM_SHARED(memory);
    const Room<T, A> room(g, m.tile, g.positions + g.h * g.columns(1), memory);
    A *const factors = room.rest;
    Holders *const holders = reinterpret_cast<Holders *>(factors + 3 * g.cells);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, many = g.pooled();
    const Part part(m.chunk, m.chunks, m.d);
    const long long n = part.n;
    const int c0 = part.c0, c1 = c0 + part.count;
    const A *stats = static_cast<const A *>(m.stats) + n * (3 * g.cells + (m.center ? 2 * g.positions : 0));
    const A *means = m.center ? stats + 3 * g.cells : nullptr;
    // Where there are more threads than positions, groups of threads share the channels of a tile.
    const int groups = MapThreads / g.positions > 1 ? MapThreads / g.positions : 1;
    const int group = tid / g.positions;
    const int q0 = groups > 1 ? tid - group * g.positions : tid, stride = groups > 1 ? g.positions : MapThreads;
    room.make_windows(g);
    make_holders(g, holders);
    const Divisors<T> divided(g.positions, m.tile);
    for (int c = c0; c < c1; c += m.tile) {
        const int count = c1 - c < m.tile ? c1 - c : m.tile;
        load_tile(m.a, divided, n, c, m.d, m.tile, count, g.h, g.w, room.pitch, room.a);
        load_tile(m.b, divided, n, c, m.d, m.tile, count, g.h, g.w, room.pitch, room.b);
        if (c == c0) // while the tiles are on their way
            make_factors<T, A>(g, m, n, stats, room.pooled_a, room.pooled_a + g.positions, factors);
        await_copies();
        __syncthreads();
        if (means)
            pool_tiles<true>(g, room, count, means);
        else
            pool_tiles<false>(g, room, count, means);
        __syncthreads();
        // The gradients of pooled values take their place.
        for (int channel = warp; channel < count; channel += MapThreads / 32)
            for (int cell = lane; cell < many; cell += 32) {
                const int at = channel * room.pooled_pitch + cell;
                const A *f = factors + 3 * (g.positions + cell), va = room.pooled_a[at], vb = room.pooled_b[at];
                room.pooled_a[at] = f[0] * vb - f[1] * va;
                room.pooled_b[at] = f[0] * va - f[2] * vb;
            }
        __syncthreads();
        // And so do those of the maps: each number is read by the thread alone that writes there.
#pragma unroll 1
        for (int q = group < groups ? q0 : g.positions; q < g.positions; q += stride) {
            const int y = q / g.w, x = q - y * g.w;
            const A f0 = factors[3 * q], f1 = factors[3 * q + 1], f2 = factors[3 * q + 2];
            const A mean_a = means ? means[q] : A(0), mean_b = means ? means[g.positions + q] : A(0);
            const auto write = [&](int channel, A from_a, A from_b) {
                T &a = room.a[channel * room.pitch + q], &b = room.b[channel * room.pitch + q];
                const A va = A(widen(a)) - mean_a, vb = A(widen(b)) - mean_b;
                a = narrow<T>(f0 * vb - f1 * va + from_a), b = narrow<T>(f0 * va - f2 * vb + from_b);
            };
            // Two channels at a time: which cells hold a position is the same for all.
#pragma unroll 1
            for (int channel = group; channel < count; channel += 2 * groups) {
                const int other = channel + groups < count ? channel + groups : channel;
                const int next = (other - channel) * room.pooled_pitch;
                A from_a = 0, from_b = 0, next_a = 0, next_b = 0;
                int start = channel * room.pooled_pitch;
                const Holders *held = holders;
#pragma unroll 1
                for (int k = 1; k < g.scales; ++k, held += g.h + g.w) {
                    const int columns = g.columns(k);
                    const Holders down = held[y], along = held[g.h + x];
#pragma unroll 1
                    for (int row = down.first; row < down.last; ++row)
#pragma unroll 1
                        for (int column = along.first; column < along.last; ++column) {
                            const A *a = room.pooled_a + start + row * columns + column;
                            const A *b = room.pooled_b + start + row * columns + column;
                            from_a += a[0], from_b += b[0], next_a += a[next], next_b += b[next];
                        }
                    start += g.rows(k) * columns;
                }
                write(channel, from_a, from_b);
                if (other != channel)
                    write(other, next_a, next_b);
            }
        }
        __syncthreads();
        if (m.grad_a.data)
            store_tile(m.grad_a, divided, n, c, m.d, m.tile, count, g.h, g.w, room.pitch, room.a);
        if (m.grad_b.data)
            store_tile(m.grad_b, divided, n, c, m.d, m.tile, count, g.h, g.w, room.pitch, room.b);
        __syncthreads();
    }
}

} // namespace
} // namespace m3em

#define M3EM_CONSENSUS_MAP(name, threads, blocks, ...)                                                                 \
    M3EM_KERNEL(consensus_map_##name, threads, blocks, m3em::ConsensusMapArguments, __VA_ARGS__)
#define M3EM_CONSENSUS_MAP_ANY(dtype, T)                                                                               \
    M3EM_CONSENSUS_MAP(partial_##dtype##_any, m3em::MapThreads, sizeof(T) > 4 ? 3 : m3em::MapBlocks, m3em::partial<T>) \
    M3EM_CONSENSUS_MAP(finish_##dtype##_any, m3em::MapThreads, m3em::MapBlocks, m3em::finish<T, m3em::MapThreads>)     \
    M3EM_CONSENSUS_MAP(backward_##dtype##_any, m3em::MapThreads, sizeof(T) > 4 ? 2 : m3em::MapBackwardBlocks,          \
                       m3em::backward<T>)
#define M3EM_CONSENSUS_MAP_SEVEN(dtype, T)                                                                             \
    M3EM_CONSENSUS_MAP(partial_##dtype##_7x7, m3em::SevenThreads, m3em::seven_forward_blocks(sizeof(T)),               \
                       m3em::partial_seven<T>)                                                                         \
    M3EM_CONSENSUS_MAP(finish_##dtype##_7x7, m3em::FinishThreads, 16, m3em::finish<T, m3em::FinishThreads, 7, 7, 3>)   \
    M3EM_CONSENSUS_MAP(backward_##dtype##_7x7, m3em::SevenThreads, m3em::SevenBackwardBlocks, m3em::backward_seven<T>)
// Of 14x14 the chunks are put together by `finish` for any map.
#define M3EM_CONSENSUS_MAP_FOURTEEN(dtype, T)                                                                          \
    M3EM_CONSENSUS_MAP(partial_##dtype##_14x14, m3em::FourteenThreads, m3em::FourteenForwardBlocks,                    \
                       m3em::partial_fourteen<T>)                                                                      \
    M3EM_CONSENSUS_MAP(backward_##dtype##_14x14, m3em::FourteenThreads, m3em::fourteen_backward_blocks(sizeof(T)),     \
                       m3em::backward_fourteen<T>)

M3EM_CONSENSUS_MAP_ANY(f64, double)
M3EM_CONSENSUS_MAP_ANY(f32, float)
M3EM_CONSENSUS_MAP_ANY(f16, __half)
M3EM_CONSENSUS_MAP_ANY(bf16, __nv_bfloat16)
M3EM_CONSENSUS_MAP_SEVEN(f32, float)
M3EM_CONSENSUS_MAP_SEVEN(f16, __half)
M3EM_CONSENSUS_MAP_SEVEN(bf16, __nv_bfloat16)
M3EM_CONSENSUS_MAP_FOURTEEN(f32, float)
M3EM_CONSENSUS_MAP_FOURTEEN(f16, __half)
M3EM_CONSENSUS_MAP_FOURTEEN(bf16, __nv_bfloat16)
