// The scales of consensus_map: which positions a cell pools, how its cosine is upsampled, and the transposes of both.
#pragma once

#include "cpu/tile.h"

#include <cstdlib>

namespace m3em {
namespace M3EM_ISA {
namespace {

constexpr int kMaxScales = 40;

// One dimension of one scale, as tables: torch's windows of adaptive pooling, and the two taps of linear upsampling.
struct Axis {
    int64_t size, length;  // cells, positions
    double *share;         // of every position: the weight of its second tap
    int32_t *low, *high;   // of every position: its two taps
    int32_t *first, *last; // of every position: the cells whose windows hold it, [first, last)
    int32_t *start, *stop; // of every cell: its window, [start, stop)

    static int64_t bytes(int64_t size, int64_t length) { return 8 * length + (16 * length + 8 * size + 7) / 8 * 8; }

    void build(int64_t cells, int64_t positions, char *memory) {
        size = cells, length = positions;
        share = reinterpret_cast<double *>(memory);
        low = reinterpret_cast<int32_t *>(share + length), high = low + length;
        first = high + length, last = first + length;
        start = last + length, stop = start + size;
        for (int64_t i = 0; i < size; ++i) {
            start[i] = int32_t(i * length / size);
            stop[i] = int32_t(((i + 1) * length + size - 1) / size);
        }
        for (int64_t p = 0; p < length; ++p) {
            first[p] = p ? first[p - 1] : 0;
            while (stop[first[p]] <= p)
                ++first[p];
            last[p] = first[p];
            while (last[p] < size && start[last[p]] <= p)
                ++last[p];
            double at = (double(p) + 0.5) * double(size) / double(length) - 0.5;
            if (at < 0)
                at = 0;
            low[p] = int32_t(int64_t(at) < size - 1 ? int64_t(at) : size - 1);
            high[p] = int32_t(low[p] + 1 < size ? low[p] + 1 : low[p]);
            share[p] = high[p] == low[p] ? 0 : at - double(low[p]);
        }
    }
};

struct Scale {
    Axis y, x;
    int64_t first; // index of its first cell
    int64_t line;  // index of its first row of cells, among the rows of all scales but scale 0
    int64_t cells() const { return y.size * x.size; }
    int64_t window(int64_t i, int64_t j) const { return (y.stop[i] - y.start[i]) * (x.stop[j] - x.start[j]); }
};

// Calls body(cell, weight) for the cells that the upsampling of one position reads. A tap of weight 0 is not read: it
// may hold the NaN of a cell that has no part in this position.
template <class A, class Body>
inline void taps(const Scale &s, int64_t y, int64_t x, const Body &body) {
    const double dy = s.y.share[y], dx = s.x.share[x];
    for (int ty = 0; ty < (dy > 0 ? 2 : 1); ++ty)
        for (int tx = 0; tx < (dx > 0 ? 2 : 1); ++tx)
            body((ty ? s.y.high[y] : s.y.low[y]) * s.x.size + (tx ? s.x.high[x] : s.x.low[x]),
                 A((ty ? dy : 1 - dy) * (tx ? dx : 1 - dx)));
}

struct Plan {
    Scale scale[kMaxScales];
    int num_scales;
    int64_t h, w, positions, cells = 0, lines = 0;
    bool seven;

    explicit Plan(const ConsensusMap &m)
        : num_scales(m.num_scales), h(m.h), w(m.w), positions(m.h * m.w),
          seven(m.h == 7 && m.w == 7 && m.num_scales == 3) {
        int64_t bytes = 0;
        for (int k = 0; k < num_scales; ++k)
            bytes += Axis::bytes(cells_of(h, k), h) + Axis::bytes(cells_of(w, k), w);
        tables = static_cast<char *>(std::malloc(size_t(bytes)));
        char *next = tables;
        for (int k = 0; k < num_scales; ++k) {
            Scale &s = scale[k];
            s.y.build(cells_of(h, k), h, next);
            next += Axis::bytes(s.y.size, h);
            s.x.build(cells_of(w, k), w, next);
            next += Axis::bytes(s.x.size, w);
            s.first = cells, s.line = lines;
            cells += s.cells();
            lines += k ? s.y.size : 0;
        }
    }
    ~Plan() { std::free(tables); }
    Plan(const Plan &) = delete;
    Plan &operator=(const Plan &) = delete;

private:
    char *tables;
    static int64_t cells_of(int64_t length, int k) { return length >> k > 1 ? length >> k : 1; }
};

// pooled[cell] = mean of the tile over the cell's window: rows first, then columns.
template <class A>
void pool(const Scale &s, int64_t w, const A *tile, A *line_of_sums, A *pooled) {
    using vec = typename vec_of<A>::type;
    const vec *in = reinterpret_cast<const vec *>(tile);
    vec *line = reinterpret_cast<vec *>(line_of_sums);
    vec *out = reinterpret_cast<vec *>(pooled);
    const int64_t rows = s.y.size, columns = s.x.size;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t y0 = s.y.start[i], y1 = s.y.stop[i];
        for (int64_t x = 0; x < w; ++x) {
            vec sum = in[y0 * w + x];
            for (int64_t y = y0 + 1; y < y1; ++y)
                sum += in[y * w + x];
            line[x] = sum;
        }
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t x0 = s.x.start[j], x1 = s.x.stop[j];
            vec sum = line[x0];
            for (int64_t x = x0 + 1; x < x1; ++x)
                sum += line[x];
            *out++ = sum * (A(1) / A((y1 - y0) * (x1 - x0)));
        }
    }
}

// Half of the transpose of pool: every row of cells, already divided by their windows, spread over the columns.
template <class A>
void spread_columns(const Scale &s, int64_t w, const A *cells, A *lines) {
    using vec = typename vec_of<A>::type;
    const vec *in = reinterpret_cast<const vec *>(cells);
    vec *out = reinterpret_cast<vec *>(lines);
    const int64_t rows = s.y.size, columns = s.x.size;
    for (int64_t i = 0; i < rows; ++i, in += columns)
        for (int64_t x = 0; x < w; ++x) {
            const int64_t j0 = s.x.first[x], j1 = s.x.last[x];
            vec sum = in[j0];
            for (int64_t j = j0 + 1; j < j1; ++j)
                sum += in[j];
            *out++ = sum;
        }
}

// Maps of 7x7 at three scales, what every network of the paper gives: 3x3 windows [0,3) [2,5) [4,7), and one of all.
// Straight-line code for them; the row sums of the large window are made from those of the small ones.
constexpr int kSeven = 7;

template <class A>
void pool_seven(const A *tile, A *pooled) {
    using vec = typename vec_of<A>::type;
    const vec *in = reinterpret_cast<const vec *>(tile);
    vec *out = reinterpret_cast<vec *>(pooled);
    vec line[3][kSeven], all{};
    for (int x = 0; x < kSeven; ++x) {
        const vec *r = in + x;
        line[0][x] = r[0] + r[7] + r[14];
        line[1][x] = r[14] + r[21] + r[28];
        line[2][x] = r[28] + r[35] + r[42];
        all += line[0][x] + r[21] + line[2][x];
    }
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            out[3 * i + j] = (line[i][2 * j] + line[i][2 * j + 1] + line[i][2 * j + 2]) * (A(1) / A(9));
    out[9] = all * (A(1) / A(49));
}

// Calls emit(position, sum of the gradients of all cells whose windows hold it). Rows and columns 0, 1 are alike, and
// so are 5, 6, so there are five different ones of each.
template <class A, class Emit>
void spread_seven(const A *cells, const Emit &emit) {
    using vec = typename vec_of<A>::type;
    const vec *in = reinterpret_cast<const vec *>(cells);
    constexpr int kind[kSeven] = {0, 0, 1, 2, 3, 4, 4};
    vec column[3][5], sum[5][5];
    for (int i = 0; i < 3; ++i) {
        const vec *t = in + 3 * i;
        column[i][0] = t[0], column[i][1] = t[0] + t[1], column[i][2] = t[1], column[i][3] = t[1] + t[2];
        column[i][4] = t[2];
    }
    for (int j = 0; j < 5; ++j) {
        sum[0][j] = column[0][j] + in[9], sum[2][j] = column[1][j] + in[9], sum[4][j] = column[2][j] + in[9];
        sum[1][j] = sum[0][j] + column[1][j], sum[3][j] = sum[2][j] + column[2][j];
    }
    for (int y = 0; y < kSeven; ++y)
        for (int x = 0; x < kSeven; ++x)
            emit(kSeven * y + x, sum[kind[y]][kind[x]]);
}

// The pooled tiles of all scales but scale 0, which is the tile itself; `pooled` is indexed by cell.
template <class A>
void pool_all(const Plan &plan, const A *tile, A *line, A *pooled) {
    if (plan.seven)
        return pool_seven(tile, pooled + V * plan.positions);
    for (int k = 1; k < plan.num_scales; ++k)
        pool(plan.scale[k], plan.w, tile, line, pooled + V * plan.scale[k].first);
}

// The transpose: calls emit(position, sum of the gradients of all cells whose windows hold it), where every cell's
// gradient is divided by its window already.
template <class A, class Emit>
void spread_all(const Plan &plan, const A *cells, A *lines, A *line_of_sums, const Emit &emit) {
    using vec = typename vec_of<A>::type;
    if (plan.seven)
        return spread_seven(cells + V * plan.positions, emit);
    const int64_t w = plan.w;
    for (int k = 1; k < plan.num_scales; ++k)
        spread_columns(plan.scale[k], w, cells + V * plan.scale[k].first, lines + V * plan.scale[k].line * w);
    vec *sum = reinterpret_cast<vec *>(line_of_sums);
    for (int64_t y = 0; y < plan.h; ++y) {
        for (int64_t x = 0; x < w; ++x)
            sum[x] = vec{};
        for (int k = 1; k < plan.num_scales; ++k) {
            const Scale &s = plan.scale[k];
            for (int64_t i = s.y.first[y]; i < s.y.last[y]; ++i) {
                const vec *line = reinterpret_cast<const vec *>(lines) + (s.line + i) * w;
                for (int64_t x = 0; x < w; ++x)
                    sum[x] += line[x];
            }
        }
        for (int64_t x = 0; x < w; ++x)
            emit(y * w + x, sum[x]);
    }
}

} // namespace
} // namespace M3EM_ISA
} // namespace m3em
