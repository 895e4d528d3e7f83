// Blocks of eight channels with the channel as the fastest dimension ("tiles"), in the accumulation type, whatever the
// layout and dtype in memory. Over channels every sum of these ops is the same for all positions, so kernels are
// written once, over tiles, and vectorise without a thought of H and W.
//
// Everything lives in the namespace of the instruction set it is compiled for, and nothing of the standard library's
// templates is used: the linker merges such functions across files, and could hand AVX code to an old processor.
#pragma once

#include "cpu/kernels.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#ifndef M3EM_ISA
#error "the build compiles csrc/cpu once for every instruction set and names it in M3EM_ISA"
#endif

namespace m3em {
namespace M3EM_ISA {

constexpr int V = 8; // channels of a tile

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

template <class T>
struct acc_of {
    using type = float;
};
template <>
struct acc_of<double> {
    using type = double;
};

typedef float vec_f32 __attribute__((vector_size(V * 4), aligned(4)));
typedef double vec_f64 __attribute__((vector_size(V * 8), aligned(8)));
template <class A>
struct vec_of;
template <>
struct vec_of<float> {
    using type = vec_f32;
};
template <>
struct vec_of<double> {
    using type = vec_f64;
};

static inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static inline double widen(double x) { return x; }
static inline float widen(float x) { return x; }
static inline float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
static inline float widen(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00)
        return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Two exact multiplications bring the exponent into place, subnormal numbers included.
    return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000)));
#endif
}

static inline void narrow(double x, double &y) { y = x; }
static inline void narrow(float x, float &y) { y = x; }
static inline void narrow(float x, bf16 &y) {
    const uint32_t bits = as_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        y.bits = uint16_t(bits >> 16 | 0x40); // rounding could carry a NaN over into infinity
    else
        y.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void narrow(float x, f16 &y) {
#if defined(__F16C__)
    y.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        y.bits = uint16_t(sign | 0x7e00);
    else if (rest >= 0x47800000)
        y.bits = uint16_t(sign | 0x7c00);
    else if (rest < 0x38800000) // below the smallest normal half: one rounding, done by the addition
        y.bits = uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000));
    else
        y.bits = uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
#endif
}

static inline void widen_row(const double *from, double *to, int64_t count) { std::memcpy(to, from, count * 8); }
static inline void widen_row(const float *from, float *to, int64_t count) { std::memcpy(to, from, count * 4); }
template <class T>
static inline void widen_row(const T *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = widen(from[i]);
}
template <class A, class T>
static inline void narrow_row(const A *from, T *to, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        narrow(from[i], to[i]);
}
#if defined(__AVX2__) && defined(__F16C__)
static inline void widen_row(const f16 *from, float *to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
    for (; i < count; ++i)
        to[i] = widen(from[i]);
}
static inline void narrow_row(const float *from, f16 *to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; ++i)
        narrow(from[i], to[i]);
}
static inline void widen_row(const bf16 *from, float *to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i));
        _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
    }
    for (; i < count; ++i)
        to[i] = widen(from[i]);
}
static inline __m256i narrow_eight(const float *from) {
    const __m256 x = _mm256_loadu_ps(from);
    const __m256i bits = _mm256_castps_si256(x),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
}
static inline void narrow_row(const float *from, bf16 *to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m256i packed = _mm256_packus_epi32(narrow_eight(from + i), narrow_eight(from + i + 8));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    for (; i < count; ++i)
        narrow(from[i], to[i]);
}
#endif

// Eight rows of `count` numbers, `pitch` apart, into `count` columns of eight, `step` apart.
template <class A>
static inline void transpose_in(const A *rows, int64_t pitch, A *tile, int64_t count, int64_t step = V) {
    int64_t p = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
        for (; p + 8 <= count; p += 8) {
            __m256 r[8], t[8];
            for (int i = 0; i < 8; ++i)
                r[i] = _mm256_loadu_ps(rows + i * pitch + p);
            for (int i = 0; i < 4; ++i) {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for (int i = 0; i < 2; ++i) {
                r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
                r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
                r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
                r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
            }
            for (int i = 0; i < 4; ++i) {
                _mm256_storeu_ps(tile + (p + i) * step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
                _mm256_storeu_ps(tile + (p + i + 4) * step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
            }
        }
    }
#endif
    for (; p < count; ++p)
        for (int i = 0; i < V; ++i)
            tile[p * step + i] = rows[i * pitch + p];
}

// The other way; the matrix of eight by eight is its own inverse.
template <class A>
static inline void transpose_out(const A *tile, A *rows, int64_t pitch, int64_t count, int64_t step = V) {
    int64_t p = 0;
    for (; p + V <= count; p += V) {
        A block[V * V];
        transpose_in(tile + p * step, step, block, V);
        for (int i = 0; i < V; ++i)
            std::memcpy(rows + i * pitch + p, block + i * V, V * sizeof(A));
    }
    for (; p < count; ++p)
        for (int i = 0; i < V; ++i)
            rows[i * pitch + p] = tile[p * step + i];
}

enum class Layout { rows, channels_last, strided };

// The layout of one sample (C,H,W) of a tensor. A dimension of size 1 may have any stride.
static inline Layout layout_of(const Tensor &t, int64_t c, int64_t h, int64_t w) {
    const int64_t *s = t.stride;
    if ((w == 1 || s[3] == 1) && (h == 1 || s[2] == w) && (c == 1 || s[1] == h * w))
        return Layout::rows;
    if ((c == 1 || s[1] == 1) && (w == 1 || s[3] == c) && (h == 1 || s[2] == c * w))
        return Layout::channels_last;
    return Layout::strided;
}

// Channels c0 .. c0+count of one sample as a tile whose positions are `step` apart; channels that are not there are 0.
// `rows` is room for V*H*W.
template <class T, class A>
static inline void load_tile(const T *sample, const Tensor &t, Layout layout, int64_t c0, int count, int64_t c,
                             int64_t h, int64_t w, A *rows, A *tile, int64_t step = V) {
    const int64_t p = h * w;
    if (layout == Layout::channels_last) {
        for (int64_t q = 0; q < p; ++q) {
            if (count < V)
                for (int i = count; i < V; ++i)
                    tile[q * step + i] = 0;
            widen_row(sample + q * c + c0, tile + q * step, count);
        }
        return;
    }
    if (layout == Layout::rows) {
        if constexpr (sizeof(T) == sizeof(A)) {
            if (count == V) {
                transpose_in(reinterpret_cast<const A *>(sample) + c0 * p, p, tile, p, step);
                return;
            }
        }
        widen_row(sample + c0 * p, rows, count * p);
    } else {
        for (int i = 0; i < count; ++i)
            for (int64_t y = 0; y < h; ++y)
                for (int64_t x = 0; x < w; ++x)
                    rows[(i * h + y) * w + x] =
                        widen(sample[(c0 + i) * t.stride[1] + y * t.stride[2] + x * t.stride[3]]);
    }
    for (int64_t q = count * p; q < V * p; ++q)
        rows[q] = 0;
    transpose_in(rows, p, tile, p, step);
}

// Whether what a call reads and writes, `numbers` in all, is more than caches hold. Results are then stored past them:
// an ordinary store reads the line that it writes to, and nobody finds so large a result in a cache again. Below it the
// detour through scratch would cost more than it saves.
static inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
static inline bool past_cache(int64_t numbers, Dtype dtype) {
    constexpr int64_t cache = 32 << 20;
    return numbers * size_of(dtype) >= cache;
}

// Moves a finished run of results from scratch to where they belong. `past`: past the caches.
static inline void put_run(void *to, const void *from, int64_t bytes, bool past) {
    int64_t at = 0;
#if defined(__AVX2__)
    if (past) {
        char *out = static_cast<char *>(to);
        const char *in = static_cast<const char *>(from);
        // Sixteen bytes are what a run of eight channels is a multiple of in half precision. Halves and quarters of a
        // line that follow one another are written as one line.
        const auto sixteen = [&] {
            const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i *>(in + at));
            _mm_stream_si128(reinterpret_cast<__m128i *>(out + at), part);
            at += 16;
        };
        const int64_t skew = int64_t(-reinterpret_cast<uintptr_t>(to) & 15);
        if (skew <= bytes) {
            std::memcpy(out, in, skew);
            at = skew;
            if (at + 16 <= bytes && reinterpret_cast<uintptr_t>(out + at) & 16)
                sixteen();
            for (; at + 32 <= bytes; at += 32) {
                const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(in + at));
                _mm256_stream_si256(reinterpret_cast<__m256i *>(out + at), part);
            }
            if (at + 16 <= bytes)
                sixteen();
        }
    }
#else
    (void)past;
#endif
    std::memcpy(static_cast<char *>(to) + at, static_cast<const char *>(from) + at, bytes - at);
}

// Asks for memory that is read soon: rows of a map are so short and a tile has so many that the hardware sees no
// pattern in them. Level 1 is the nearest cache. No harm is done behind the end.
template <int Level>
static inline void prefetch(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(static_cast<const char *>(from) + at, 0, 4 - Level);
}

// Results in the accumulation type, one after another, to where they belong.
template <class T, class A>
static inline void put_rows(const A *from, T *to, int64_t count, bool past) {
    if constexpr (sizeof(T) == sizeof(A)) {
        put_run(to, from, count * int64_t(sizeof(T)), past);
    } else if (!past) {
        narrow_row(from, to, count);
    } else {
        constexpr int64_t few = 512;
        T narrowed[few];
        for (int64_t at = 0; at < count; at += few) {
            const int64_t now = count - at < few ? count - at : few;
            narrow_row(from + at, narrowed, now);
            put_run(to + at, narrowed, now * int64_t(sizeof(T)), true);
        }
    }
}

template <class T, class A>
static inline void store_tile(const A *tile, T *sample, const Tensor &t, Layout layout, int64_t c0, int count,
                              int64_t c, int64_t h, int64_t w, A *rows, int64_t step = V, bool past = false) {
    const int64_t p = h * w;
    if (layout == Layout::channels_last) {
        for (int64_t q = 0; q < p; ++q)
            narrow_row(tile + q * step, sample + q * c + c0, count);
        return;
    }
    transpose_out(tile, rows, p, p, step);
    if (layout == Layout::rows) {
        put_rows(rows, sample + c0 * p, count * p, past);
        return;
    }
    for (int i = 0; i < count; ++i)
        for (int64_t y = 0; y < h; ++y)
            for (int64_t x = 0; x < w; ++x)
                narrow(rows[(i * h + y) * w + x], sample[(c0 + i) * t.stride[1] + y * t.stride[2] + x * t.stride[3]]);
}

template <class T>
static inline T *sample_of(const Tensor &t, int64_t n) {
    return static_cast<T *>(t.data) + n * t.stride[0];
}

// One number of a tensor of any dtype, `at` elements from its start, for what is small beside x: gates and maps.
template <class A>
static inline A element(const Tensor &t, int64_t at) {
    switch (t.dtype) {
    case Dtype::f64:
        return A(static_cast<const double *>(t.data)[at]);
    case Dtype::f32:
        return A(static_cast<const float *>(t.data)[at]);
    case Dtype::f16:
        return A(widen(static_cast<const f16 *>(t.data)[at]));
    default:
        return A(widen(static_cast<const bf16 *>(t.data)[at]));
    }
}
template <class A>
static inline void put(const Tensor &t, int64_t at, A value) {
    switch (t.dtype) {
    case Dtype::f64:
        static_cast<double *>(t.data)[at] = double(value);
        break;
    case Dtype::f32:
        static_cast<float *>(t.data)[at] = float(value);
        break;
    case Dtype::f16:
        narrow(float(value), static_cast<f16 *>(t.data)[at]);
        break;
    case Dtype::bf16:
        narrow(float(value), static_cast<bf16 *>(t.data)[at]);
        break;
    }
}
// The same at (n, c) of a matrix (N,C).
template <class A>
static inline A matrix_at(const Tensor &t, int64_t n, int64_t c) {
    return element<A>(t, n * t.stride[0] + c * t.stride[1]);
}
template <class A>
static inline void put_matrix(const Tensor &t, int64_t n, int64_t c, A value) {
    put(t, n * t.stride[0] + c * t.stride[1], value);
}

// Scratch of one thread, on cache lines of its own.
struct Scratch {
    char *data;
    explicit Scratch(int64_t bytes) : data(static_cast<char *>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {}
    ~Scratch() { std::free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    template <class A>
    A *take(int64_t count) {
        A *part = reinterpret_cast<A *>(data + used);
        used += (count * int64_t(sizeof(A)) + 63) / 64 * 64;
        return part;
    }
    int64_t used = 0;
};

// Before another thread may read what was stored past the caches.
static inline void finish_stores() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Runs body(thread's scratch, i) for i < count. Which thread has which i changes no result: every i is on its own.
template <class Body>
static inline void for_each(int64_t count, int threads, int64_t scratch, const Body &body) {
#if defined(_OPENMP)
    if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
        {
            Scratch mine(scratch);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; ++i) {
                mine.used = 0;
                body(mine, i);
                finish_stores();
            }
        }
        return;
    }
#endif
    (void)threads;
    Scratch mine(scratch);
    for (int64_t i = 0; i < count; ++i) {
        mine.used = 0;
        body(mine, i);
    }
    finish_stores();
}

// Calls body(T{}) with the type of a dtype.
template <class Body>
static inline void with_type(Dtype dtype, const Body &body) {
    switch (dtype) {
    case Dtype::f64:
        return body(double{});
    case Dtype::f32:
        return body(float{});
    case Dtype::f16:
        return body(f16{});
    case Dtype::bf16:
        return body(bf16{});
    }
}

} // namespace M3EM_ISA
} // namespace m3em
