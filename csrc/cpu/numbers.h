// Numbers of every dtype: their types, the one that sums are made in, and the ways from one to the other, one at a
// time, in rows and in registers of eight.
//
// Everything lives in the namespace of the instruction set it is compiled for, and nothing of the standard library's
// templates is used: the linker merges such functions across files, and could hand AVX code to an old processor.
#pragma once

#include "cpu/kernels.h"

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef M3EM_ISA
#error "the build compiles csrc/cpu once for every instruction set and names it in M3EM_ISA"
#endif

namespace m3em {
namespace M3EM_ISA {

constexpr int V = 8; // channels of a tile, numbers of a register

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
static inline __m256i narrow_eight(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    if (__builtin_expect(_mm256_movemask_ps(nan), 0)) {
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    }
    return _mm256_srli_epi32(rounded, 16);
}
static inline void narrow_row(const float *from, bf16 *to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m256i packed =
            _mm256_packus_epi32(narrow_eight(_mm256_loadu_ps(from + i)), narrow_eight(_mm256_loadu_ps(from + i + 8)));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    for (; i < count; ++i)
        narrow(from[i], to[i]);
}

static inline __m256 load_eight(const float *from) { return _mm256_loadu_ps(from); }
static inline __m256 load_eight(const f16 *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
static inline __m256 load_eight(const bf16 *from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline void store_eight(__m256 x, float *to) { _mm256_storeu_ps(to, x); }
static inline void store_eight(__m256 x, f16 *to) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_eight(__m256 x, bf16 *to) {
    const __m256i bits = narrow_eight(x);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), packed);
}
#endif

} // namespace M3EM_ISA
} // namespace m3em
