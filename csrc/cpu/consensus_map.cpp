// consensus_map: all scales in one pass over the channels.
//
// Per sample, a tile of eight channels of a and of b is read once. From it come the pooled tiles of every scale, and
// for every cell (a position of some scale) the eight-fold partial sums of a*b, a*a and b*b. At the end the lanes are
// added, the cosines taken, upsampled and summed. The backward reads a and b once more: with the three numbers that
// the forward left for every cell,
//     d cos / d a  =  inv * b - ratio_a * a,     inv = 1 / (|a| |b|),  ratio_a = cos / |a|^2,
// it forms the gradient of every pooled tile and spreads it over the windows. So the memory traffic is a and b, and in
// the backward their gradients, and nothing else of that size.
#include "cpu/tile.h"

#include <cmath>

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

template <class A>
A add_lanes(const A *lanes) {
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// What one thread works with: a pair of tiles, their pooled tiles, and room for what lies between.
template <class A>
struct Room {
    A *rows, *line, *tile[2], *pooled[2];
    static int64_t bytes(const Plan &plan) {
        return int64_t(sizeof(A)) * V * (3 * plan.positions + plan.w + 2 * plan.cells) + 6 * 64;
    }
    Room(Scratch &scratch, const Plan &plan) {
        rows = scratch.take<A>(V * plan.positions);
        line = scratch.take<A>(V * plan.w);
        for (A *&t : tile)
            t = scratch.take<A>(V * plan.positions);
        for (A *&t : pooled)
            t = scratch.take<A>(V * plan.cells);
    }
};

// The maps a and b of one sample, tile by tile.
template <class T>
struct Pair {
    using A = typename acc_of<T>::type;
    const ConsensusMap &m;
    const Tensor *tensor[2];
    Layout layout[2];
    explicit Pair(const ConsensusMap &map) : m(map), tensor{&map.a, &map.b} {
        for (int i = 0; i < 2; ++i)
            layout[i] = layout_of(*tensor[i], m.d, m.h, m.w);
    }

    // Calls body(first channel, number of channels) with the tiles loaded, and with `means` subtracted if there are
    // any.
    template <class Body>
    void tiles(int64_t n, Room<A> &room, const A *means, const Body &body) const {
        const int64_t p = m.h * m.w;
        for (int64_t c0 = 0; c0 < m.d; c0 += V) {
            const int count = int(m.d - c0 < V ? m.d - c0 : V);
            for (int i = 0; i < 2; ++i) {
                load_tile<T, A>(sample_of<const T>(*tensor[i], n), *tensor[i], layout[i], c0, count, m.d, m.h, m.w,
                                room.rows, room.tile[i]);
                if (means)
                    for (int64_t q = 0; q < p; ++q)
                        for (int lane = 0; lane < count; ++lane)
                            room.tile[i][q * V + lane] -= means[i * p + q];
            }
            body(c0, count);
        }
    }
};

template <class T>
void forward(const ConsensusMap &m) {
    using A = typename acc_of<T>::type;
    using vec = typename vec_of<A>::type;
    const Plan plan(m);
    const Pair<T> pair(m);
    const int64_t p = plan.positions, stats_size = consensus_map_stats(m.h, m.w, m.num_scales, m.center);
    const int64_t bytes =
        Room<A>::bytes(plan) + int64_t(sizeof(A)) * (3 * V * plan.cells + stats_size + p + plan.cells) + 4 * 64;
    for_each(m.n, m.threads, bytes, [&](Scratch &scratch, int64_t n) {
        Room<A> room(scratch, plan);
        A *sums = scratch.take<A>(3 * V * plan.cells);
        A *stats = scratch.take<A>(stats_size);
        A *total = scratch.take<A>(p);
        A *cosine = scratch.take<A>(plan.cells);
        if (m.stats)
            stats = static_cast<A *>(m.stats) + n * stats_size;
        A *means = nullptr;
        if (m.center) {
            // A pass of its own: sums of squares from which the mean is taken only afterwards lose all their digits
            // where it is large. The second pass finds the sample in the cache.
            means = stats + 3 * plan.cells;
            for (int64_t q = 0; q < 2 * V * p; ++q)
                sums[q] = 0;
            pair.tiles(n, room, nullptr, [&](int64_t, int) {
                for (int i = 0; i < 2; ++i)
                    for (int64_t q = 0; q < V * p; ++q)
                        sums[i * V * p + q] += room.tile[i][q];
            });
            for (int64_t q = 0; q < 2 * p; ++q)
                means[q] = add_lanes(sums + q * V) / A(m.d);
        }
        for (int64_t i = 0; i < 3 * V * plan.cells; ++i)
            sums[i] = 0;
        pair.tiles(n, room, means, [&](int64_t, int) {
            for (int i = 0; i < 2; ++i)
                pool_all(plan, room.tile[i], room.line, room.pooled[i]);
            vec *sum = reinterpret_cast<vec *>(sums);
            const auto add = [&](A *const *tile, int64_t from, int64_t to) {
                const vec *a = reinterpret_cast<const vec *>(tile[0]), *b = reinterpret_cast<const vec *>(tile[1]);
                for (int64_t cell = from; cell < to; ++cell) {
                    sum[3 * cell] += a[cell] * b[cell];
                    sum[3 * cell + 1] += a[cell] * a[cell];
                    sum[3 * cell + 2] += b[cell] * b[cell];
                }
            };
            add(room.tile, 0, p);
            add(room.pooled, p, plan.cells);
        });
        for (int64_t cell = 0; cell < plan.cells; ++cell) {
            const A *lanes = sums + 3 * V * cell;
            const A dot = add_lanes(lanes), aa = add_lanes(lanes + V), bb = add_lanes(lanes + 2 * V);
            const A norm_a = std::sqrt(aa), norm_b = std::sqrt(bb), eps = A(m.eps);
            // A NaN or an infinity in one map is no small norm, however small the other map is there.
            const bool small = (norm_a < eps || norm_b < eps) && std::isfinite(aa) && std::isfinite(bb);
            cosine[cell] = small ? A(0) : dot / (norm_a * norm_b);
            stats[3 * cell] = small ? A(0) : A(1) / (norm_a * norm_b);
            stats[3 * cell + 1] = small ? A(0) : cosine[cell] / aa;
            stats[3 * cell + 2] = small ? A(0) : cosine[cell] / bb;
        }
        for (int64_t y = 0; y < m.h; ++y)
            for (int64_t x = 0; x < m.w; ++x) {
                A value = cosine[y * m.w + x];
                for (int k = 1; k < m.num_scales; ++k)
                    taps<A>(plan.scale[k], y, x,
                            [&](int64_t cell, A weight) { value += weight * cosine[plan.scale[k].first + cell]; });
                total[y * m.w + x] = value;
            }
        narrow_row(total, static_cast<T *>(m.out.data) + n * p, p);
    });
}

template <class T>
void backward(const ConsensusMap &m) {
    using A = typename acc_of<T>::type;
    using vec = typename vec_of<A>::type;
    const Plan plan(m);
    const Pair<T> pair(m);
    const int64_t p = plan.positions, stats_size = consensus_map_stats(m.h, m.w, m.num_scales, m.center);
    const Tensor *results[2] = {&m.grad_a, &m.grad_b};
    const Layout layouts[2] = {layout_of(m.grad_a, m.d, m.h, m.w), layout_of(m.grad_b, m.d, m.h, m.w)};
    const int64_t bytes =
        Room<A>::bytes(plan) + int64_t(sizeof(A)) * (p + 3 * plan.cells + V * p + V * plan.lines * m.w) + 6 * 64;
    for_each(m.n, m.threads, bytes, [&](Scratch &scratch, int64_t n) {
        Room<A> room(scratch, plan);
        A *grad_out = scratch.take<A>(p);
        A *factors = scratch.take<A>(3 * plan.cells);
        A *grad = scratch.take<A>(V * p);
        A *lines = scratch.take<A>(V * plan.lines * m.w);
        const A *stats = static_cast<const A *>(m.stats) + n * stats_size;
        const T *go = sample_of<const T>(m.grad_out, n);
        for (int64_t y = 0; y < m.h; ++y)
            for (int64_t x = 0; x < m.w; ++x)
                grad_out[y * m.w + x] = widen(go[y * m.grad_out.stride[2] + x * m.grad_out.stride[3]]);
        // The gradient of every cell's cosine (the transpose of the upsampling), times the cell's three numbers and,
        // for the way back through the pooling, divided by its window.
        for (int64_t i = 0; i < 3 * plan.cells; ++i)
            factors[i] = 0;
        for (int k = 0; k < m.num_scales; ++k) {
            const Scale &s = plan.scale[k];
            A *f = factors + 3 * s.first;
            for (int64_t y = 0; y < m.h; ++y)
                for (int64_t x = 0; x < m.w; ++x)
                    taps<A>(s, y, x, [&](int64_t cell, A weight) { f[3 * cell] += weight * grad_out[y * m.w + x]; });
            for (int64_t i = 0; i < s.y.size; ++i)
                for (int64_t j = 0; j < s.x.size; ++j) {
                    const int64_t cell = i * s.x.size + j;
                    const A *three = stats + 3 * (s.first + cell);
                    const A g = f[3 * cell] / A(s.window(i, j));
                    // A dead cell passes nothing on, not even of a gradient that is infinite.
                    const bool dead = three[0] == 0 && three[1] == 0 && three[2] == 0;
                    for (int e = 0; e < 3; ++e)
                        f[3 * cell + e] = dead ? A(0) : g * three[e];
                }
        }
        pair.tiles(n, room, m.center ? stats + 3 * plan.cells : nullptr, [&](int64_t c0, int count) {
            const vec *a = reinterpret_cast<const vec *>(room.tile[0]);
            const vec *b = reinterpret_cast<const vec *>(room.tile[1]);
            for (int i = 0; i < 2; ++i)
                pool_all(plan, room.tile[i], room.line, room.pooled[i]);
            // The gradients of pooled tiles take the place of the tiles themselves.
            vec *pooled_a = reinterpret_cast<vec *>(room.pooled[0]);
            vec *pooled_b = reinterpret_cast<vec *>(room.pooled[1]);
            for (int64_t cell = p; cell < plan.cells; ++cell) {
                const A *f = factors + 3 * cell;
                const vec va = pooled_a[cell], vb = pooled_b[cell];
                pooled_a[cell] = f[0] * vb - f[1] * va;
                pooled_b[cell] = f[0] * va - f[2] * vb;
            }
            for (int i = 0; i < 2; ++i) {
                if (!results[i]->data)
                    continue;
                vec *to = reinterpret_cast<vec *>(grad);
                const vec *own = i ? b : a, *other = i ? a : b;
                const A *f = factors;
                spread_all(plan, room.pooled[i], lines, room.line, [&](int64_t q, const vec &from_cells) {
                    to[q] = f[3 * q] * other[q] - f[3 * q + 1 + i] * own[q] + from_cells;
                });
                store_tile<T, A>(grad, sample_of<T>(*results[i], n), *results[i], layouts[i], c0, count, m.d, m.h, m.w,
                                 room.rows);
            }
        });
    });
}

} // namespace

void consensus_map_forward(const ConsensusMap &m) {
    with_type(m.a.dtype, [&](auto t) { forward<decltype(t)>(m); });
}
void consensus_map_backward(const ConsensusMap &m) {
    with_type(m.a.dtype, [&](auto t) { backward<decltype(t)>(m); });
}

} // namespace M3EM_ISA
} // namespace m3em
