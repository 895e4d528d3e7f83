// Rows: the numbers of one channel of a sample, in any dtype, read and summed without a copy in between.
#pragma once

#include "cpu/tile.h"

namespace m3em {
namespace M3EM_ISA {

// Channels c0 .. c0+count of one sample as rows of H*W numbers: where the memory holds just that, it itself, else a
// copy in `room`, which has space for count*H*W.
template <class T, class A>
static inline const A *load_rows(const T *sample, const Tensor &t, Layout layout, int64_t c0, int64_t count, int64_t h,
                                 int64_t w, A *room) {
    const int64_t p = h * w;
    if (layout == Layout::rows) {
        if constexpr (sizeof(T) == sizeof(A))
            return reinterpret_cast<const A *>(sample) + c0 * p;
        widen_row(sample + c0 * p, room, count * p);
        return room;
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t y = 0; y < h; ++y)
            for (int64_t x = 0; x < w; ++x)
                room[(i * h + y) * w + x] = widen(sample[(c0 + i) * t.stride[1] + y * t.stride[2] + x * t.stride[3]]);
    return room;
}

// Eight numbers of a row in the accumulation type. By reference: a vector as a result has no one form across
// instruction sets.
static inline void widen_eight(const double *from, vec_f64 &to) { to = *reinterpret_cast<const vec_f64 *>(from); }
static inline void widen_eight(const float *from, vec_f32 &to) { to = *reinterpret_cast<const vec_f32 *>(from); }
template <class T>
static inline void widen_eight(const T *from, vec_f32 &to) {
    widen_row(from, reinterpret_cast<float *>(&to), V);
}
#if defined(__AVX2__)
static inline void widen_eight(const f16 *from, vec_f32 &to) {
    to = (vec_f32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
static inline void widen_eight(const bf16 *from, vec_f32 &to) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    to = (vec_f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
#endif

// The sum of eight partial sums, in the order in which hardware adds neighbours. Not of a vector as an argument of a
// template, which would lose the alignment that its type has.
template <class A>
static inline A total(const A *sum) {
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// Of the sum of row*y, a row in any dtype: eight partial sums in a fixed order, and the rest.
template <class T, class A>
static inline void dot_parts(const T *row, const A *y, int64_t count, typename vec_of<A>::type &part, A &tail) {
    using vec = typename vec_of<A>::type;
    vec sum{};
    int64_t q = 0;
    for (; q + V <= count; q += V) {
        vec x;
        widen_eight(row + q, x);
        sum += x * *reinterpret_cast<const vec *>(y + q);
    }
    part = sum;
    tail = 0;
    for (; q < count; ++q)
        tail += widen(row[q]) * y[q];
}
template <class T, class A>
static inline A dot_row(const T *row, const A *y, int64_t count) {
    typename vec_of<A>::type part;
    A tail;
    dot_parts(row, y, count, part, tail);
    return total(reinterpret_cast<const A *>(&part)) + tail;
}

// The same of two rows in any dtype.
template <class T>
static inline typename acc_of<T>::type dot_two(const T *row, const T *other, int64_t count) {
    using A = typename acc_of<T>::type;
    typename vec_of<A>::type sum{}, x, y;
    int64_t q = 0;
    for (; q + V <= count; q += V) {
        widen_eight(row + q, x);
        widen_eight(other + q, y);
        sum += x * y;
    }
    A tail = 0;
    for (; q < count; ++q)
        tail += widen(row[q]) * widen(other[q]);
    return total(reinterpret_cast<const A *>(&sum)) + tail;
}

// dot_row of eight rows, `p` numbers each and one after another, with one row `y`: bitwise the same.
template <class T, class A>
static inline void dot_rows(const T *rows, const A *y, int64_t p, typename vec_of<A>::type &to) {
    using vec = typename vec_of<A>::type;
    vec sum[V], tail;
    // Row after row, as they lie in memory: eight streams at once are more than the hardware fetches ahead for.
    for (int i = 0; i < V; ++i) {
        A rest;
        dot_parts(rows + i * p, y, p, sum[i], rest);
        tail[i] = rest;
    }
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
        __m256 four[2];
        for (int i = 0; i < 2; ++i)
            four[i] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)sum[4 * i], (__m256)sum[4 * i + 1]),
                                     _mm256_hadd_ps((__m256)sum[4 * i + 2], (__m256)sum[4 * i + 3]));
        const __m256 low = _mm256_permute2f128_ps(four[0], four[1], 0x20);
        const __m256 high = _mm256_permute2f128_ps(four[0], four[1], 0x31);
        to = (vec)_mm256_add_ps(low, high) + tail;
        return;
    }
#endif
    for (int i = 0; i < V; ++i)
        to[i] = total(reinterpret_cast<const A *>(&sum[i]));
    to += tail;
}

// sums[q] += row[q] * factor
template <class T, class A>
static inline void add_row(const T *row, A factor, A *sums, int64_t p) {
    using vec = typename vec_of<A>::type;
    int64_t q = 0;
    for (; q + V <= p; q += V) {
        vec x;
        widen_eight(row + q, x);
        *reinterpret_cast<vec *>(sums + q) += x * factor;
    }
    for (; q < p; ++q)
        sums[q] += widen(row[q]) * factor;
}

// The first `count` numbers of row n of a matrix (N,C), and the other way, from c0 on.
template <class A>
static inline void load_matrix(const Tensor &t, int64_t n, int64_t count, A *to) {
    with_type(t.dtype, [&](auto type) {
        using T = decltype(type);
        const T *from = static_cast<const T *>(t.data) + n * t.stride[0];
        if constexpr (sizeof(typename acc_of<T>::type) == sizeof(A)) {
            if (t.stride[1] == 1)
                return widen_row(from, to, count);
        }
        for (int64_t i = 0; i < count; ++i)
            to[i] = A(widen(from[i * t.stride[1]]));
    });
}
template <class A>
static inline void store_matrix(const Tensor &t, int64_t n, int64_t c0, int64_t count, const A *from) {
    for (int64_t i = 0; i < count; ++i)
        put_matrix(t, n, c0 + i, from[i]);
}

} // namespace M3EM_ISA
} // namespace m3em
