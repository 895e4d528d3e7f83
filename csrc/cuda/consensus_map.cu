// consensus_map on a card: all scales in one pass over the channels.
//
// A block takes one chunk of the channels of one sample, tile after tile: a and b of the tile go to shared memory once,
// the pooled values of every scale are made there, and one thread per cell (a position of some scale) adds up a*b, a*a
// and b*b over the channels. A second, small kernel adds the chunks in their order, takes the cosines and upsamples
// them. The backward reads a and b once more, with three numbers a cell that the forward left:
//
//     d cos / d a  =  inv * b - ratio_a * a,     inv = 1 / (|a| |b|),  ratio_a = cos / |a|^2.
//
// Chunks and tiles depend on D, H, W and the dtype alone, and every sum has one order, so a sample's result does not
// depend on the others in the batch nor on the card.
#include "cuda/consensus_map.cuh"
#include "cuda/device.cuh"
#include "cuda/scales.cuh"
#include "cuda/sums.cuh"

namespace m3em {
namespace {

// Channels c0 .. c0+count of a sample to rows of `pitch` numbers in shared memory, less `means` if there are any.
template <class T, class A>
__device__ void load_tile(const Map &map, long long n, int c0, int count, int h, int w, int pitch, const A *means,
                          A *tile) {
    const T *sample = sample_of<const T>(map, n, c0);
    const int p = h * w, all = count * p, tid = threadIdx.x;
    if (map.stride[3] == 1 && (h == 1 || map.stride[2] == w) && (count == 1 || map.stride[1] == p)) {
        // One stretch of memory, 16 bytes at a time where it begins on such a boundary.
        constexpr int Wide = 16 / sizeof(T);
        const bool wide = (reinterpret_cast<unsigned long long>(sample) & 15) == 0;
        const int packs = wide ? all / Wide : 0;
        const Pack<T> *from = reinterpret_cast<const Pack<T> *>(sample);
#pragma unroll 1
        for (int i = tid; i < packs; i += MapThreads) {
            const Pack<T> pack = from[i];
            int c = i * Wide / p, q = i * Wide - c * p;
#pragma unroll
            for (int e = 0; e < Wide; ++e) {
                tile[c * pitch + q] = widen(pack.at[e]) - (means ? means[q] : A(0));
                if (++q == p)
                    q = 0, ++c;
            }
        }
#pragma unroll 1
        for (int i = packs * Wide + tid; i < all; i += MapThreads) {
            const int c = i / p, q = i - c * p;
            tile[c * pitch + q] = widen(sample[i]) - (means ? means[q] : A(0));
        }
        return;
    }
    // Any strides; neighbouring threads take neighbouring channels, which are neighbours in channels_last memory.
#pragma unroll 1
    for (int i = tid; i < all; i += MapThreads) {
        const int q = i / count, c = i - q * count, y = q / w, x = q - y * w;
        tile[c * pitch + q] =
            widen(sample[c * map.stride[1] + y * map.stride[2] + x * map.stride[3]]) - (means ? means[q] : A(0));
    }
}

// Shared memory, in the order in which it is laid out: both tiles, their pooled values, and what else a kernel needs.
template <class A>
struct Room {
    A *a, *b, *pooled_a, *pooled_b, *rest;
    template <class G>
    __device__ Room(const G &g, int channels, unsigned char *memory) {
        a = reinterpret_cast<A *>(memory);
        b = a + channels * g.pitch();
        pooled_a = b + channels * g.pitch();
        pooled_b = pooled_a + channels * g.pooled_pitch();
        rest = pooled_b + channels * g.pooled_pitch();
    }
};

// The pooled values of all scales but the first, for both tiles. A warp takes a cell, its lanes take channels.
template <class A, class G>
__device__ void pool_tiles(const G &g, const Room<A> &room, int count) {
    const int pitch = g.pitch(), pooled_pitch = g.pooled_pitch(), many = g.cells - g.positions;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int item = warp; item < 2 * many; item += MapThreads / 32) {
        const bool second = item >= many;
        const int cell = item - (second ? many : 0) + g.positions;
        const int k = g.scale_of(cell), columns = g.columns(k), rows = g.rows(k), at = cell - g.first(k);
        const int i = at / columns, j = at - i * columns;
        const int y0 = window_start(i, g.h, rows), y1 = window_stop(i, g.h, rows);
        const int x0 = window_start(j, g.w, columns), x1 = window_stop(j, g.w, columns);
        const A share = A(1) / A((y1 - y0) * (x1 - x0));
        for (int c = lane; c < count; c += 32) {
            const A *row = (second ? room.b : room.a) + c * pitch;
            A sum = 0;
            for (int y = y0; y < y1; ++y)
                for (int x = x0; x < x1; ++x)
                    sum += row[y * g.w + x];
            (second ? room.pooled_b : room.pooled_a)[c * pooled_pitch + cell - g.positions] = sum * share;
        }
    }
}

// Sums of one chunk of one sample.
template <class T, int H0, int W0, int S0>
__device__ void partial(const ConsensusMapArguments &m) {
    using A = typename acc_of<T>::type;
    const Geometry<H0, W0, S0> g(m);
    M3EM_SHARED(memory);
    const Room<A> room(g, m.tile, memory);
    const bool center = m.center;
    const int per_cell = SumsOf(center), tid = threadIdx.x;
    const Part part(m.chunk, m.chunks, m.d);
    const long long n = part.n;
    const int c0 = part.c0, c1 = c0 + part.count;
    // Where there are more threads than cells, groups of threads share the channels of a tile.
    const int groups = MapThreads / g.cells > 1 ? MapThreads / g.cells : 1;
    const int group = tid / g.cells, stride = groups > 1 ? g.cells : MapThreads;
    A *sums = room.rest; // [group][cell][per_cell], each cell of a group one thread's own
    for (int i = tid; i < groups * g.cells * per_cell; i += MapThreads)
        sums[i] = 0;
    int done = 0; // channels of this thread's group so far
    for (int c = c0; c < c1; c += m.tile) {
        const int count = c1 - c < m.tile ? c1 - c : m.tile;
        __syncthreads();
        load_tile<T, A>(m.a, n, c, count, g.h, g.w, g.pitch(), nullptr, room.a);
        load_tile<T, A>(m.b, n, c, count, g.h, g.w, g.pitch(), nullptr, room.b);
        __syncthreads();
        pool_tiles(g, room, count);
        __syncthreads();
        if (group >= groups)
            continue;
        const int mine = count > group ? (count - group + groups - 1) / groups : 0;
        const Share<A> share(done, mine);
        const A one = mine ? A(1) / A(mine) : A(0);
#pragma unroll 1
        for (int cell = groups > 1 ? tid - group * g.cells : tid; cell < g.cells; cell += stride) {
            const bool whole = cell < g.positions;
            const int step = whole ? g.pitch() : g.pooled_pitch();
            const A *a = (whole ? room.a + cell : room.pooled_a + cell - g.positions) + group * step;
            const A *b = (whole ? room.b + cell : room.pooled_b + cell - g.positions) + group * step;
            Sums<A> here;
            here.clear();
            if (center && mine) {
                for (int i = 0; i < mine; ++i)
                    here.mean_a += a[i * groups * step], here.mean_b += b[i * groups * step];
                here.mean_a *= one, here.mean_b *= one;
            }
            for (int i = 0; i < mine; ++i) {
                const A va = a[i * groups * step] - here.mean_a, vb = b[i * groups * step] - here.mean_b;
                here.ab += va * vb, here.aa += va * va, here.bb += vb * vb;
            }
            A *own = sums + (group * g.cells + cell) * per_cell;
            Sums<A> before;
            before.load(own, center);
            before.merge(here, share, center);
            before.store(own, center);
        }
        done += mine;
    }
    __syncthreads();
    // The groups in their order. How many channels each had follows from the tiles.
    A *to = static_cast<A *>(m.partial) + (long long)blockIdx.x * g.cells * per_cell;
#pragma unroll 1
    for (int cell = tid; cell < g.cells; cell += MapThreads) {
        Sums<A> total, other;
        total.clear();
        int channels = 0;
#pragma unroll 1
        for (int i = 0; i < groups; ++i) {
            int more = 0;
            for (int c = c0; c < c1; c += m.tile) {
                const int count = c1 - c < m.tile ? c1 - c : m.tile;
                more += count > i ? (count - i + groups - 1) / groups : 0;
            }
            other.load(sums + (i * g.cells + cell) * per_cell, center);
            total.merge(other, Share<A>(channels, more), center);
            channels += more;
        }
        total.store(to + cell * per_cell, center);
    }
}

// Of one sample: the chunks together, the cosines, their upsampling, and what the backward will need.
template <class T, int H0, int W0, int S0>
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
    for (int cell = tid; cell < g.cells; cell += MapThreads) {
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
    for (int q = tid; q < g.positions; q += MapThreads) {
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
// through the pooling divided by its window, times the three numbers that the forward left.
template <class A, class T, class G>
__device__ void make_factors(const G &g, const ConsensusMapArguments &m, long long n, const A *stats, A *grad,
                             A *factors) {
#pragma unroll 1
    for (int q = threadIdx.x; q < g.positions; q += MapThreads) {
        const int y = q / g.w, x = q - y * g.w;
        const long long at = n * m.grad_out.stride[0] + y * m.grad_out.stride[2] + x * m.grad_out.stride[3];
        grad[q] = m.wide ? static_cast<const A *>(m.grad_out.data)[at]
                         : A(widen(static_cast<const T *>(m.grad_out.data)[at]));
    }
    __syncthreads();
#pragma unroll 1
    for (int cell = threadIdx.x; cell < g.cells; cell += MapThreads) {
        const int k = g.scale_of(cell), rows = g.rows(k), columns = g.columns(k), at = cell - g.first(k);
        const int i = at / columns, j = at - i * columns;
        A sum = 0;
        if (k == 0) {
            sum = grad[cell];
        } else {
#pragma unroll 1
            for (int y = 0; y < g.h; ++y) {
                const A wy = Taps<A>(y, g.h, rows).of(i);
                if (wy == A(0))
                    continue;
#pragma unroll 1
                for (int x = 0; x < g.w; ++x) {
                    const A wx = Taps<A>(x, g.w, columns).of(j);
                    if (wx != A(0))
                        sum += wy * wx * grad[y * g.w + x];
                }
            }
            sum /= A((window_stop(i, g.h, rows) - window_start(i, g.h, rows)) *
                     (window_stop(j, g.w, columns) - window_start(j, g.w, columns)));
        }
        const A *three = stats + 3 * cell;
        // A dead cell passes nothing on, not even of a gradient that is infinite.
        const bool dead = three[0] == 0 && three[1] == 0 && three[2] == 0;
        for (int e = 0; e < 3; ++e)
            factors[3 * cell + e] = dead ? A(0) : sum * three[e];
    }
    __syncthreads();
}

// Rows of shared memory to channels c0 .. c0+count of a gradient.
template <class T, class A>
__device__ void store_tile(const Map &map, long long n, int c0, int count, int h, int w, int pitch, const A *tile) {
    T *sample = sample_of<T>(map, n, c0);
    const int p = h * w, all = count * p;
    if (map.stride[1] == 1 && count > 1) {
#pragma unroll 1
        for (int i = threadIdx.x; i < all; i += MapThreads) {
            const int q = i / count, c = i - q * count, y = q / w, x = q - y * w;
            sample[c + y * map.stride[2] + x * map.stride[3]] = narrow<T>(tile[c * pitch + q]);
        }
        return;
    }
    for (int i = threadIdx.x; i < all; i += MapThreads) {
        const int c = i / p, q = i - c * p, y = q / w, x = q - y * w;
        sample[c * map.stride[1] + y * map.stride[2] + x * map.stride[3]] = narrow<T>(tile[c * pitch + q]);
    }
}

template <class T, int H0, int W0, int S0>
__device__ void backward(const ConsensusMapArguments &m) {
    using A = typename acc_of<T>::type;
    const Geometry<H0, W0, S0> g(m);
    M3EM_SHARED(memory);
    const Room<A> room(g, m.tile, memory);
    A *factors = room.rest, *grad = factors + 3 * g.cells;
    const int tid = threadIdx.x, pitch = g.pitch(), pooled_pitch = g.pooled_pitch();
    const Part part(m.chunk, m.chunks, m.d);
    const long long n = part.n;
    const int c0 = part.c0, c1 = c0 + part.count;
    const A *stats = static_cast<const A *>(m.stats) + n * (3 * g.cells + (m.center ? 2 * g.positions : 0));
    const A *means = m.center ? stats + 3 * g.cells : nullptr;
    make_factors<A, T>(g, m, n, stats, grad, factors);
    for (int c = c0; c < c1; c += m.tile) {
        const int count = c1 - c < m.tile ? c1 - c : m.tile;
        load_tile<T, A>(m.a, n, c, count, g.h, g.w, pitch, means, room.a);
        load_tile<T, A>(m.b, n, c, count, g.h, g.w, pitch, means ? means + g.positions : means, room.b);
        __syncthreads();
        pool_tiles(g, room, count);
        __syncthreads();
        // The gradients of pooled values take their place.
        const int many = g.cells - g.positions;
        for (int i = tid; i < count * many; i += MapThreads) {
            const int channel = i / many, cell = i - channel * many, at = channel * pooled_pitch + cell;
            const A *f = factors + 3 * (g.positions + cell), va = room.pooled_a[at], vb = room.pooled_b[at];
            room.pooled_a[at] = f[0] * vb - f[1] * va;
            room.pooled_b[at] = f[0] * va - f[2] * vb;
        }
        __syncthreads();
        // And so do those of the maps: each number is read by the thread alone that writes there.
#pragma unroll 1
        for (int i = tid; i < count * g.positions; i += MapThreads) {
            const int channel = i / g.positions, q = i - channel * g.positions, y = q / g.w, x = q - y * g.w;
            A from_a = 0, from_b = 0;
            for (int k = 1; k < g.scales; ++k) {
                const int rows = g.rows(k), columns = g.columns(k);
                const int start = channel * pooled_pitch + g.first(k) - g.positions;
                const int i1 = holder_last(y, g.h, rows), j0 = holder_first(x, g.w, columns),
                          j1 = holder_last(x, g.w, columns);
                for (int row = holder_first(y, g.h, rows); row < i1; ++row)
                    for (int column = j0; column < j1; ++column) {
                        from_a += room.pooled_a[start + row * columns + column];
                        from_b += room.pooled_b[start + row * columns + column];
                    }
            }
            const A *f = factors + 3 * q;
            A &a = room.a[channel * pitch + q], &b = room.b[channel * pitch + q];
            const A grad_a = f[0] * b - f[1] * a + from_a, grad_b = f[0] * a - f[2] * b + from_b;
            a = grad_a, b = grad_b;
        }
        __syncthreads();
        if (m.grad_a.data)
            store_tile<T, A>(m.grad_a, n, c, count, g.h, g.w, pitch, room.a);
        if (m.grad_b.data)
            store_tile<T, A>(m.grad_b, n, c, count, g.h, g.w, pitch, room.b);
        __syncthreads();
    }
}

} // namespace
} // namespace m3em

#define M3EM_CONSENSUS_MAP(dtype, T, form, ...)                                                                        \
    M3EM_KERNEL(consensus_map_partial_##dtype##_##form, m3em::MapThreads, m3em::MapBlocks,                             \
                m3em::ConsensusMapArguments, m3em::partial<T, __VA_ARGS__>)                                            \
    M3EM_KERNEL(consensus_map_finish_##dtype##_##form, m3em::MapThreads, m3em::MapBlocks, m3em::ConsensusMapArguments, \
                m3em::finish<T, __VA_ARGS__>)                                                                          \
    M3EM_KERNEL(consensus_map_backward_##dtype##_##form, m3em::MapThreads, m3em::MapBlocks,                            \
                m3em::ConsensusMapArguments, m3em::backward<T, __VA_ARGS__>)

M3EM_CONSENSUS_MAP(f32, float, 7x7, 7, 7, 3)
M3EM_CONSENSUS_MAP(f16, __half, 7x7, 7, 7, 3)
M3EM_CONSENSUS_MAP(bf16, __nv_bfloat16, 7x7, 7, 7, 3)
M3EM_CONSENSUS_MAP(f64, double, any, 0, 0, 0)
M3EM_CONSENSUS_MAP(f32, float, any, 0, 0, 0)
M3EM_CONSENSUS_MAP(f16, __half, any, 0, 0, 0)
M3EM_CONSENSUS_MAP(bf16, __nv_bfloat16, any, 0, 0, 0)
