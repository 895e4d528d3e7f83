// The scales of consensus_map: which positions a cell pools, and which cells the upsampling of a position reads.
#pragma once

#include "cuda/consensus_map.cuh"
#include "cuda/slab.cuh"

namespace m3em {
namespace {

// Sizes of the scales; constants of the compiler where H0, W0 and S0 are not 0.
template <int H0, int W0, int S0>
struct Geometry {
    int h, w, scales, positions, cells;

    __device__ Geometry(const ConsensusMapArguments &m)
        : h(H0 ? H0 : m.h), w(W0 ? W0 : m.w), scales(S0 ? S0 : m.scales), positions(h * w), cells(first(scales)) {}
    __device__ int rows(int k) const { return h >> k > 1 ? h >> k : 1; }
    __device__ int columns(int k) const { return w >> k > 1 ? w >> k : 1; }
    // The first cell of a scale, counted over all scales.
    __device__ int first(int k) const {
        int cell = 0;
        for (int i = 0; i < k; ++i)
            cell += rows(i) * columns(i);
        return cell;
    }
    __device__ int scale_of(int cell) const {
        int k = 0;
        while (k + 1 < scales && cell >= first(k + 1))
            ++k;
        return k;
    }
    __device__ int pooled() const { return cells - positions; }
};

// torch's windows of adaptive pooling: cell i of `size` holds positions [start, stop) of `length`.
__device__ inline int window_start(int i, int length, int size) { return i * length / size; }
__device__ inline int window_stop(int i, int length, int size) { return ((i + 1) * length + size - 1) / size; }
// And the other way: the cells [first, last) that hold a position.
__device__ inline int holder_first(int p, int length, int size) { return p * size / length; }
__device__ inline int holder_last(int p, int length, int size) { return ((p + 1) * size + length - 1) / length; }

// The positions that a cell pools: so many rows and columns from one position on.
struct __align__(8) Window {
    unsigned start;
    unsigned short rows, columns;
    Window() = default;
    template <class G>
    __device__ Window(const G &g, int cell) {
        const int k = g.scale_of(cell), down = g.rows(k), along = g.columns(k), at = cell - g.first(k);
        const int i = at / along, j = at - i * along, y = window_start(i, g.h, down), x = window_start(j, g.w, along);
        start = y * g.w + x;
        rows = window_stop(i, g.h, down) - y, columns = window_stop(j, g.w, along) - x;
    }
    __device__ int size() const { return rows * columns; }
};

// The cells first .. last of a scale, along one side, that hold a position.
struct __align__(4) Holders {
    unsigned short first, last;
};

// The two cells that linear upsampling reads for a position, and the share of the second, from whole numbers.
template <class A>
struct Taps {
    int low, high;
    A share;
    __device__ Taps(int p, int length, int size) {
        const int at = (2 * p + 1) * size - length, unit = 2 * length;
        low = at <= 0 ? 0 : at / unit;
        low = low < size - 1 ? low : size - 1;
        high = low + 1 < size ? low + 1 : low;
        share = at <= 0 || high == low ? A(0) : A(at - low * unit) / A(unit);
    }
    // The weight of one cell.
    __device__ A of(int cell) const { return (cell == low ? A(1) - share : A(0)) + (cell == high ? share : A(0)); }
};

// The gradient of a sample's result, row by row.
template <class T, class A>
__device__ inline void load_grad(const ConsensusMapArguments &m, long long n, int h, int w, int threads, A *to) {
    const long long *s = m.grad_out.stride;
#pragma unroll 1
    for (int q = threadIdx.x; q < h * w; q += threads) {
        const int y = q / w, x = q - y * w;
        to[q] = read<T, A>(m.grad_out.data, n * s[0] + y * s[2] + x * s[3], m.wide);
    }
}

} // namespace
} // namespace m3em
