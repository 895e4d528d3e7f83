// consensus_map: all scales in one pass over the channels.
//
// Per sample, a tile of eight channels of a and of b is read once. From it come the pooled tiles of every scale, and
// for every cell (a position of some scale) the eight-fold partial sums of a*b, a*a and b*b. At the end the lanes are
// added, the cosines taken, upsampled and summed. The backward reads a and b once more: with the three numbers that
// the forward left for every cell,
//     d cos / d a  =  inv * b - ratio_a * a,     inv = 1 / (|a| |b|),  ratio_a = cos / |a|^2,
// it forms the gradient of every pooled tile and spreads it over the windows. So the memory traffic is a and b, and in
// the backward their gradients, and nothing else of that size.
#include "cpu/scales.h"
#include "cpu/tile.h"

#include <cmath>

namespace m3em {
namespace M3EM_ISA {
namespace {

constexpr int64_t Ahead = 2 * V; // channels between those that are worked on and those that are fetched

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
    bool far; // more than a second-level cache holds
    explicit Pair(const ConsensusMap &map) : m(map), tensor{&map.a, &map.b} {
        for (int i = 0; i < 2; ++i)
            layout[i] = layout_of(*tensor[i], m.d, m.h, m.w);
        far = m.n * m.d * m.h * m.w * int64_t(sizeof(T)) >= int64_t(2) << 20;
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
                if (far && layout[i] == Layout::rows)
                    prefetch<1>(sample_of<const T>(*tensor[i], n) + (c0 + Ahead) * p, V * p * int64_t(sizeof(T)));
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
    const bool past = past_cache(4 * m.n * m.d * p, m.a.dtype);
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
                                 room.rows, V, past);
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
