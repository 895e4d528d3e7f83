// The sums of one cell over channels, and how those of two groups of channels become one.
#pragma once

#include "cuda/device.cuh"

namespace m3em {
namespace {

// How the sums of `count` channels take up those of `more` (Chan's formula).
template <class A>
struct Share {
    A part, both;
    __device__ Share(int count, int more) : part(more ? A(more) / A(count + more) : A(0)), both(A(count) * part) {}
};

// Numbers that one cell is summed up in. Without `center` dot, aa, bb; with it, of the deviations from the means, and
// the means themselves: sums of squares from which the mean is taken afterwards lose their digits where it is large.
template <class A>
struct Sums {
    A ab, aa, bb, mean_a, mean_b;
    __device__ void clear() { ab = aa = bb = mean_a = mean_b = A(0); }
    __device__ void load(const A *from, bool center) {
        ab = from[0], aa = from[1], bb = from[2];
        mean_a = center ? from[3] : A(0), mean_b = center ? from[4] : A(0);
    }
    __device__ void store(A *to, bool center) const {
        to[0] = ab, to[1] = aa, to[2] = bb;
        if (center)
            to[3] = mean_a, to[4] = mean_b;
    }
    __device__ void merge(const Sums &others, const Share<A> &share, bool center) {
        ab += others.ab, aa += others.aa, bb += others.bb;
        if (!center)
            return;
        const A da = others.mean_a - mean_a, db = others.mean_b - mean_b;
        ab += da * db * share.both, aa += da * da * share.both, bb += db * db * share.both;
        mean_a += da * share.part, mean_b += db * share.part;
    }
};
__host__ __device__ constexpr int SumsOf(bool center) { return center ? 5 : 3; }

} // namespace
} // namespace m3em
