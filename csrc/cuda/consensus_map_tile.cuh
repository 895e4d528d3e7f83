// A tile of the channels of both maps in shared memory, as it came, and what is pooled from it: maps of any size, at
// any scales, in any memory.
#pragma once

#include "cuda/async.cuh"
#include "cuda/last_packs.cuh"
#include "cuda/scales.cuh"
#include "cuda/slab.cuh"

namespace m3em {
namespace {

// Shared memory, in the order in which it is laid out; `rest` is what else a kernel needs.
template <class T, class A>
struct Room {
    int pitch, pooled_pitch;
    T *a, *b;
    A *pooled_a, *pooled_b;
    Window *windows; // of every pooled cell; null where a tile is one channel
    A *rest;

    // `spare`: numbers that are needed in the place of the pooled values, before there are any.
    template <class G>
    __device__ Room(const G &g, int channels, int spare, unsigned char *memory)
        : pitch(int(tile_pitch(g.positions, 16 / sizeof(T)))), pooled_pitch(odd(g.pooled())) {
        a = reinterpret_cast<T *>(memory);
        b = reinterpret_cast<T *>(memory + tile_bytes(channels, g.positions, sizeof(T)));
        pooled_a = reinterpret_cast<A *>(memory + 2 * tile_bytes(channels, g.positions, sizeof(T)));
        pooled_b = pooled_a + channels * pooled_pitch;
        A *const end = pooled_a + pooled_numbers(channels, g.pooled(), spare);
        windows = channels > 1 ? reinterpret_cast<Window *>(end) : nullptr;
        rest = channels > 1 ? reinterpret_cast<A *>(windows + g.pooled()) : end;
    }
    // Divisions are dear: once for a block, not once for a tile.
    template <class G>
    __device__ void make_windows(const G &g) const {
        for (int cell = threadIdx.x; windows && cell < g.pooled(); cell += MapThreads)
            windows[cell] = Window(g, g.positions + cell);
    }
};

// body(c, q, number in memory) for all numbers of a tile; neighbouring lanes take neighbouring channels, which are
// neighbours in channels_last memory.
template <class T, class Body>
__device__ inline void each_strided(T *sample, const Map &map, int count, int h, int w, const Body &body) {
    const int warp = threadIdx.x / 32, y0 = warp / w, x0 = warp - y0 * w;
    for (int c = threadIdx.x % 32; c < count; c += 32) {
        T *const channel = sample + c * map.stride[1];
        int y = y0, x = x0;
#pragma unroll 1
        for (int q = warp; q < h * w; q += MapThreads / 32) {
            body(c, q, channel[y * map.stride[2] + x * map.stride[3]]);
            for (x += MapThreads / 32; x >= w; x -= w)
                ++y;
        }
    }
}

// What a thread's number is divided by for its place among the packs of a tile: those of a channel, or those of a
// position. Divisions are dear: once for a block, not once for a tile. In one word, of which threads have few.
template <class T>
class Divisors {
    static constexpr int Wide = 16 / sizeof(T);
    static_assert(MapThreads <= 256, "which is exact for");
    unsigned inverses; // of 2^16, two halves
    __device__ static unsigned inverse_of(int count) {
        return count == 1 ? 0 : count > 256 ? 255 : (1u << 16) / unsigned(count) + 1;
    }
    __device__ static int divided(unsigned i, unsigned inverse) { return inverse ? i * inverse >> 16 : i; }

public:
    __device__ Divisors(int positions, int tile)
        : inverses(inverse_of(positions / Wide > 1 ? positions / Wide : 1) |
                   inverse_of(tile / Wide > 1 ? tile / Wide : 1) << 16) {}
    __device__ int by_packs_of_channel(int i) const { return divided(i, inverses & 0xffffu); }
    __device__ int by_packs_of_position(int i) const { return divided(i, inverses >> 16); }
};

// body(where in the tile, where in memory) for all packs of `count` channels whose numbers lie one after another, then
// rest(where in the tile, where in memory) for the numbers that fill no pack.
template <class T, class Body, class Rest>
__device__ inline void each_pack(const T *sample, const Divisors<T> &divided, int count, int positions, int pitch,
                                 const Body &body, const Rest &rest) {
    constexpr int Wide = 16 / sizeof(T);
    const int tid = threadIdx.x, all = count * positions;
    if (!wide(sample)) {
        for (int c = tid / 32; c < count; c += MapThreads / 32)
            for (int q = tid % 32; q < positions; q += 32)
                rest(c * pitch + q, c * positions + q);
    } else if (pitch == positions) {
        const int packs = all / Wide;
#pragma unroll 2
        for (int i = tid; i < packs; i += MapThreads)
            body(i * Wide, i * Wide);
        for (int i = packs * Wide + tid; i < all; i += MapThreads)
            rest(i, i);
    } else {
        const int per = positions / Wide, channels = divided.by_packs_of_channel(MapThreads),
                  step = MapThreads - channels * per;
        int c = divided.by_packs_of_channel(tid), k = tid - c * per;
#pragma unroll 2
        for (int i = tid; i < count * per; i += MapThreads) {
            body(c * pitch + k * Wide, i * Wide);
            c += channels, k += step;
            if (k >= per)
                k -= per, ++c;
        }
    }
}

// Channels side by side in whole packs, at all positions: body(where in the tile, where in memory) for every pack of
// `count` channels, of which a tile holds `most`.
template <class T, class Body>
__device__ inline void each_last(const Map &map, const Divisors<T> &divided, int most, int count, int h, int w,
                                 int pitch, const Body &body) {
    constexpr int Wide = 16 / sizeof(T);
    const int first = divided.by_packs_of_position(threadIdx.x), down = divided.by_packs_of_position(MapThreads);
    const int c = (int(threadIdx.x) - first * (most / Wide)) * Wide; // which the compiler sees to be whole packs
    const long long step = step_of(map, w);
    if (c < count && first < down)
#pragma unroll 1
        for (int q = first; q < h * w; q += down)
            body(c * pitch + q, q * step + c);
}

// How the numbers of a sample lie. The same for all of its tiles, but they have no register to keep it in.
enum class Lie { line, last, any };

template <class T>
__device__ inline Lie lie_of(const Map &map, int d, int most, int h, int w) {
    const long long *s = map.stride;
    if ((w == 1 || s[3] == 1) && (h == 1 || s[2] == w) && (d == 1 || s[1] == h * w))
        return Lie::line;
    // As last_in_packs(), but for strides that nobody uses.
    const unsigned all = unsigned(s[0]) | unsigned(s[2]) | unsigned(s[3]) | unsigned(d) | unsigned(most);
    const bool packs = all % (16 / sizeof(T)) == 0 && wide(map.data);
    return sizeof(T) < 8 && packs && s[1] == 1 && s[2] == w * s[3] ? Lie::last : Lie::any;
}

// Channels c0 .. c0+count of the d of a sample to a tile, which holds `most`; there after await_copies() and a barrier.
template <class T>
__device__ void load_tile(const Map &map, const Divisors<T> &divided, long long n, int c0, int d, int most, int count,
                          int h, int w, int pitch, T *tile) {
    constexpr int Wide = 16 / sizeof(T);
    const T *const sample = sample_of<const T>(map, n, c0);
    const Lie lie = lie_of<T>(map, d, most, h, w);
    if (lie == Lie::line)
        each_pack(
            sample, divided, count, h * w, pitch, [&](int to, int from) { copy_pack(tile + to, sample + from); },
            [&](int to, int from) { tile[to] = sample[from]; });
    else if (sizeof(T) < 8 && lie == Lie::last)
        each_last<T>(map, divided, most, count, h, w, pitch, [&](int to, long long from) {
            const Few<T, Wide> few = unpacked<T>(load_words(sample + from));
#pragma unroll
            for (int e = 0; e < Wide; ++e)
                tile[to + e * pitch] = few.at[e];
        });
    else
        each_strided(sample, map, count, h, w, [&](int c, int q, T x) { tile[c * pitch + q] = x; });
}

// And back, for gradients.
template <class T>
__device__ void store_tile(const Map &map, const Divisors<T> &divided, long long n, int c0, int d, int most, int count,
                           int h, int w, int pitch, const T *tile) {
    constexpr int Wide = 16 / sizeof(T);
    T *const sample = sample_of<T>(map, n, c0);
    const Lie lie = lie_of<T>(map, d, most, h, w);
    if (lie == Lie::line)
        each_pack(
            sample, divided, count, h * w, pitch,
            [&](int from, int to) { store<Wide>(sample + to, load<Wide>(tile + from)); },
            [&](int from, int to) { sample[to] = tile[from]; });
    else if (sizeof(T) < 8 && lie == Lie::last)
        each_last<T>(map, divided, most, count, h, w, pitch, [&](int from, long long to) {
            Few<T, Wide> few;
#pragma unroll
            for (int e = 0; e < Wide; ++e)
                few.at[e] = tile[from + e * pitch];
            store<Wide>(sample + to, few);
        });
    else
        each_strided(sample, map, count, h, w, [&](int c, int q, T &x) { x = tile[c * pitch + q]; });
}

// The pooled values of all scales but the first, for both maps. `Center`: of what is left of the numbers when `means`
// (of a at every position, then of b) are taken off. Lanes take channels, so that all of a warp or of a part of it have
// the same window.
template <bool Center, class T, class A, class G>
__device__ void pool_tiles(const G &g, const Room<T, A> &room, int count, const A *means) {
    const int many = g.pooled(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int shift = 5;
    while (shift > 0 && 1 << (shift - 1) >= count)
        --shift;
    const int lanes = 1 << shift;
#pragma unroll 1
    for (int cell = (warp * 32 + lane) >> shift; cell < many; cell += MapThreads >> shift) {
        const Window window = room.windows ? room.windows[cell] : Window(g, g.positions + cell);
        const A share = A(1) / A(window.size());
        const int rows = window.rows, columns = window.columns;
        const A *const mean_a = Center ? means + window.start : nullptr;
#pragma unroll 1
        for (int c = lane & (lanes - 1); c < count; c += lanes) {
            int at = c * room.pitch + window.start;
            A sum_a = 0, sum_b = 0;
#pragma unroll 1
            for (int y = 0; y < rows; ++y, at += g.w)
#pragma unroll 2
                for (int x = 0; x < columns; ++x) {
                    const T *a = room.a + at, *b = room.b + at;
                    const int q = y * g.w + x;
                    sum_a += Center ? A(widen(a[x])) - mean_a[q] : A(widen(a[x]));
                    sum_b += Center ? A(widen(b[x])) - mean_a[g.positions + q] : A(widen(b[x]));
                }
            room.pooled_a[c * room.pooled_pitch + cell] = sum_a * share;
            room.pooled_b[c * room.pooled_pitch + cell] = sum_b * share;
        }
    }
}

} // namespace
} // namespace m3em
