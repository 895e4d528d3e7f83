// The matrix product of gated_projection: a block of sums in registers, and the panels that it reads.
//
// A panel is W columns of a matrix, row after row: k rows of W numbers. W is two registers wide where the instruction
// set has wide ones, so that R rows of sums, one row of the panel and one broadcast number fill the register file.
#pragma once

#include "cpu/rows.h"

namespace m3em {
namespace M3EM_ISA {

#if defined(__AVX512F__)
constexpr int RegisterBytes = 64, RegisterRows = 12;
#elif defined(__AVX2__)
constexpr int RegisterBytes = 32, RegisterRows = 6;
#else
constexpr int RegisterBytes = 16, RegisterRows = 6;
#endif

typedef float lanes_f32 __attribute__((vector_size(RegisterBytes), aligned(4)));
typedef double lanes_f64 __attribute__((vector_size(RegisterBytes), aligned(8)));
template <class A>
struct Block;
template <>
struct Block<float> {
    using vec = lanes_f32;
    static constexpr int L = RegisterBytes / 4, NV = 2, R = RegisterRows, W = L * NV;
};
template <>
struct Block<double> {
    using vec = lanes_f64;
    // A panel has to hold whole tiles of V columns.
    static constexpr int L = RegisterBytes / 8, NV = 2 * L < V ? 4 : 2, R = NV == 4 ? 3 : RegisterRows, W = L * NV;
};

// What stays in registers: R rows of W sums.
template <class A, int R>
struct Sums {
    using B = Block<A>;
    typename B::vec at[R][B::NV];

    inline __attribute__((always_inline)) void clear() {
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < B::NV; ++v)
                at[i][v] = typename B::vec{};
    }
    inline __attribute__((always_inline)) void load(const A *from) {
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < B::NV; ++v)
                at[i][v] = *reinterpret_cast<const typename B::vec *>(from + i * B::W + v * B::L);
    }
    inline __attribute__((always_inline)) void store(A *to) const {
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < B::NV; ++v)
                *reinterpret_cast<typename B::vec *>(to + i * B::W + v * B::L) = at[i][v];
    }
    // to[i][j] += at[i][j] * factors[j]
    inline __attribute__((always_inline)) void add_scaled(const A *factors, A *to) const {
        for (int v = 0; v < B::NV; ++v) {
            const typename B::vec factor = *reinterpret_cast<const typename B::vec *>(factors + v * B::L);
            for (int i = 0; i < R; ++i)
                *reinterpret_cast<typename B::vec *>(to + i * B::W + v * B::L) += at[i][v] * factor;
        }
    }
    // sums[j] += sum over i of at[i][j] * others[i][j]
    inline __attribute__((always_inline)) void add_products(const A *others, A *sums) const {
        for (int v = 0; v < B::NV; ++v) {
            typename B::vec sum = *reinterpret_cast<const typename B::vec *>(sums + v * B::L);
            for (int i = 0; i < R; ++i)
                sum += at[i][v] * *reinterpret_cast<const typename B::vec *>(others + i * B::W + v * B::L);
            *reinterpret_cast<typename B::vec *>(sums + v * B::L) = sum;
        }
    }
    // at[i][j] += sum over k of a[i * row + k * step] * panel[k][j]
    inline __attribute__((always_inline)) void multiply(const A *a, int64_t row, int64_t step, const A *panel,
                                                        int64_t count) {
        for (int64_t k = 0; k < count; ++k) {
            typename B::vec b[B::NV];
            for (int v = 0; v < B::NV; ++v)
                b[v] = *reinterpret_cast<const typename B::vec *>(panel + k * B::W + v * B::L);
            for (int i = 0; i < R; ++i) {
                const A one = a[i * row + k * step];
                for (int v = 0; v < B::NV; ++v)
                    at[i][v] += one * b[v];
            }
        }
    }
};

// Calls body(Sums<A, rows>{}, first row) for all of `count` rows, in blocks that differ by one row at most: a block of
// one row left over would cost as much as a full one.
template <class A, int R, class Body>
static inline __attribute__((always_inline)) void with_rows(int rows, int64_t first, const Body &body) {
    if (rows == R)
        body(Sums<A, R>{}, first);
    else if constexpr (R > 1)
        with_rows<A, R - 1>(rows, first, body);
}
template <class A, class Body>
static inline void for_rows(int64_t count, const Body &body) {
    constexpr int R = Block<A>::R;
    const int64_t blocks = (count + R - 1) / R, least = count / blocks, more = count % blocks;
    for (int64_t i = 0, first = 0; i < blocks; ++i) {
        const int rows = int(least + (i < more));
        with_rows<A, R>(rows, first, body);
        first += rows;
    }
}

// Calls body(T{}) with the type of a dtype that accumulates in A; the others cannot be.
template <class A, class Body>
static inline void with_type_of(Dtype dtype, const Body &body) {
    with_type(dtype, [&](auto type) {
        if constexpr (sizeof(typename acc_of<decltype(type)>::type) == sizeof(A))
            body(type);
    });
}

// Rows of a sample (K,H,W) as the product reads them: number (k, p) is data[k * row + p * step].
template <class A>
struct Operand {
    const A *data;
    int64_t row, step;
};

// Rows k0 .. k0+count of sample n: where its memory has even steps, it itself, else a copy in `room` (count*H*W).
template <class A>
static inline Operand<A> operand(const Tensor &t, int64_t n, int64_t k0, int64_t count, int64_t k, int64_t h, int64_t w,
                                 A *room) {
    const int64_t *s = t.stride;
    const bool even = h == 1 || w == 1 || s[2] == w * s[3];
    constexpr Dtype own = sizeof(A) == 8 ? Dtype::f64 : Dtype::f32;
    if (t.dtype == own && even)
        return {static_cast<const A *>(t.data) + n * s[0] + k0 * s[1], s[1], w == 1 ? s[2] : s[3]};
    Operand<A> copied{room, h * w, 1};
    with_type_of<A>(t.dtype, [&](auto type) {
        using T = decltype(type);
        const T *sample = sample_of<T>(t, n);
        const Layout layout = layout_of(t, k, h, w);
        if (layout == Layout::channels_last) {
            for (int64_t p = 0; p < h * w; ++p)
                widen_row(sample + p * k + k0, room + p * count, count);
            copied = {room, 1, count};
        } else {
            copied.data = load_rows(sample, t, layout, k0, count, h, w, room);
        }
    });
    return copied;
}

// Runs of memory that will be read next, fetched into the second-level cache a few lines at a time while something else
// is multiplied: nothing waits for memory then, and it is not asked for more at once than it can answer.
class Ahead {
public:
    // Rows k0 .. k0+count of sample n, where they are one run.
    void add(const Tensor &t, Layout layout, int64_t n, int64_t k0, int64_t count, int64_t positions) {
        if (layout != Layout::rows || runs == Most || count < 1)
            return;
        const int64_t size = size_of(t.dtype);
        run[runs++] = {static_cast<const char *>(t.data) + (n * t.stride[0] + k0 * positions) * size,
                       (count * positions * size + 63) / 64};
        lines += run[runs - 1].lines;
    }
    // In so many steps all of it.
    void plan(int64_t steps) { each = (lines + steps - 1) / steps; }
    inline __attribute__((always_inline)) void step() {
        for (int64_t left = each; left > 0 && now < runs; --left) {
            __builtin_prefetch(run[now].at, 0, 2);
            run[now].at += 64;
            if (--run[now].lines == 0)
                ++now;
        }
    }

private:
    static constexpr int Most = 16;
    struct Run {
        const char *at;
        int64_t lines;
    } run[Most];
    int runs = 0, now = 0;
    int64_t lines = 0, each = 0;
};

} // namespace M3EM_ISA
} // namespace m3em
