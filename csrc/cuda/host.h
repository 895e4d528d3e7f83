// What the host's half of every op shares.
#pragma once

#include "cpu/kernels.h"
#include "cuda/arguments.cuh"
#include "cuda/driver.h"

#include <algorithm>
#include <climits>

namespace m3em {
namespace cuda {
namespace {

constexpr const char *DtypeNames[] = {"f64", "f32", "f16", "bf16"};

inline Map map_of(const Tensor &t) { return {t.data, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}}; }

// Kernels count samples, channels and positions in 32 bits each, elements in 64.
inline void check_counts(const char *op, int64_t n, int64_t c, int64_t positions) {
    if (std::max({n, c, positions}) > INT_MAX)
        throw DriverError(std::string(op) + " counts at most 2^31 - 1 samples, channels and positions on a card.");
}

// Whether a map that is there holds the numbers of a sample one after another, channel by channel.
inline bool in_rows(const Tensor &t, int64_t c, int64_t h, int64_t w) {
    const int64_t *s = t.stride;
    return !t.data || ((w == 1 || s[3] == 1) && (h == 1 || s[2] == w) && (c == 1 || s[1] == h * w));
}

inline int element_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; } // bytes

} // namespace
} // namespace cuda
} // namespace m3em
