// Blocks of eight channels with the channel as the fastest dimension ("tiles"), in the accumulation type, whatever the
// layout and dtype in memory. Over channels every sum of these ops is the same for all positions, so kernels are
// written once, over tiles, and vectorise without a thought of H and W.
#pragma once

#include "cpu/numbers.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace m3em {
namespace M3EM_ISA {

#if defined(__AVX2__)
static inline void transpose_eight(__m256 (&r)[8]) {
    __m256 t[8];
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
    for (int i = 0; i < 4; ++i)
        t[i] = r[i], t[i + 4] = r[i + 4];
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}
#endif

// Eight rows of `count` numbers, `pitch` apart, into `count` columns of eight, `step` apart.
template <class T, class A>
static inline void transpose_in(const T *rows, int64_t pitch, A *tile, int64_t count, int64_t step = V) {
    int64_t p = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
        for (; p + 8 <= count; p += 8) {
            __m256 r[8];
            for (int i = 0; i < 8; ++i)
                r[i] = load_eight(rows + i * pitch + p);
            transpose_eight(r);
            for (int i = 0; i < 8; ++i)
                _mm256_storeu_ps(tile + (p + i) * step, r[i]);
        }
    }
#endif
    for (; p < count; ++p)
        for (int i = 0; i < V; ++i)
            tile[p * step + i] = widen(rows[i * pitch + p]);
}

// The other way; the matrix of eight by eight is its own inverse.
template <class T, class A>
static inline void transpose_out(const A *tile, T *rows, int64_t pitch, int64_t count, int64_t step = V) {
    int64_t p = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
        for (; p + 8 <= count; p += 8) {
            __m256 r[8];
            for (int i = 0; i < 8; ++i)
                r[i] = _mm256_loadu_ps(tile + (p + i) * step);
            transpose_eight(r);
            for (int i = 0; i < 8; ++i)
                store_eight(r[i], rows + i * pitch + p);
        }
    }
#endif
    for (; p < count; ++p)
        for (int i = 0; i < V; ++i)
            narrow(tile[p * step + i], rows[i * pitch + p]);
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
        if (count == V)
            return transpose_in(sample + c0 * p, p, tile, p, step);
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
    constexpr int64_t cache = 24 << 20;
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
    if (layout == Layout::rows) {
        T *narrowed = reinterpret_cast<T *>(rows);
        transpose_out(tile, narrowed, p, p, step);
        put_run(sample + c0 * p, narrowed, count * p * int64_t(sizeof(T)), past);
        return;
    }
    transpose_out(tile, rows, p, p, step);
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
    // Python's MemoryError. Not inside a parallel region, which no exception may leave.
    void check() const {
        if (!data)
            throw std::bad_alloc();
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
        bool missing = false;
#pragma omp parallel num_threads(threads)
        {
            Scratch mine(scratch);
            if (!mine.data) {
#pragma omp atomic write
                missing = true;
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; ++i) {
                if (!mine.data)
                    continue;
                mine.used = 0;
                body(mine, i);
                finish_stores();
            }
        }
        if (missing)
            throw std::bad_alloc();
        return;
    }
#endif
    (void)threads;
    Scratch mine(scratch);
    mine.check();
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
