// consensus_pool: one read of x; backward, one write of its gradient, and a read of x only where the map's gradient is
// wanted.
#include "cpu/rows.h"

namespace m3em {
namespace M3EM_ISA {
namespace {

// weight[position] = 1 + cmap
template <class A>
void weights(const ConsensusPool &o, int64_t n, A *weight) {
    const int64_t *s = o.cmap.stride;
    for (int64_t y = 0; y < o.h; ++y)
        for (int64_t x = 0; x < o.w; ++x)
            weight[y * o.w + x] = o.cmap.data ? A(1) + element<A>(o.cmap, n * s[0] + y * s[2] + x * s[3]) : A(1);
}

template <class T>
void forward(const ConsensusPool &o) {
    using A = typename acc_of<T>::type;
    using vec = typename vec_of<A>::type;
    const int64_t p = o.h * o.w;
    const Layout layout = layout_of(o.x, o.c, o.h, o.w);
    const int64_t bytes = int64_t(sizeof(A)) * (p + V * p + o.c) + 4 * 64;
    for_each(o.n, o.threads, bytes, [&](Scratch &scratch, int64_t n) {
        A *weight = scratch.take<A>(p);
        A *room = scratch.take<A>(V * p);
        A *sums = scratch.take<A>(o.c);
        weights(o, n, weight);
        const T *x = sample_of<const T>(o.x, n);
        if (layout != Layout::channels_last) {
            for (int64_t c0 = 0; c0 < o.c; c0 += V) {
                const int64_t count = o.c - c0 < V ? o.c - c0 : V;
                A mean[V];
                vec &means = *reinterpret_cast<vec *>(mean);
                if (layout == Layout::rows && count == V) {
                    dot_rows(x + c0 * p, weight, p, means);
                } else {
                    const A *rows = load_rows<T, A>(x, o.x, layout, c0, count, o.h, o.w, room);
                    for (int64_t i = 0; i < V; ++i)
                        mean[i] = i < count ? dot_row(rows + i * p, weight, p) : A(0);
                }
                means /= A(p);
                store_matrix(o.out, n, c0, count, mean);
            }
            return;
        }
        for (int64_t c = 0; c < o.c; ++c)
            sums[c] = 0;
        for (int64_t q = 0; q < p; ++q)
            add_row(x + q * o.c, weight[q], sums, o.c);
        for (int64_t c = 0; c < o.c; ++c)
            sums[c] /= A(p);
        store_matrix(o.out, n, 0, o.c, sums);
    });
}

template <class T>
void backward(const ConsensusPool &o) {
    using A = typename acc_of<T>::type;
    using vec = typename vec_of<A>::type;
    const int64_t p = o.h * o.w;
    const Layout layout = layout_of(o.x, o.c, o.h, o.w), gx_layout = layout_of(o.grad_x, o.c, o.h, o.w);
    const bool past = past_cache((o.grad_cmap.data ? 2 : 1) * o.n * o.c * p, o.x.dtype);
    const bool direct = sizeof(T) == sizeof(A) && !past;
    const int64_t bytes = int64_t(sizeof(A)) * (p + V * p + 3 * V * p + 2 * o.c) + 7 * 64;
    for_each(o.n, o.threads, bytes, [&](Scratch &scratch, int64_t n) {
        A *weight = scratch.take<A>(p);
        A *lanes = scratch.take<A>(V * p);
        A *rows = scratch.take<A>(V * p);
        A *tile = scratch.take<A>(V * p);
        A *made = scratch.take<A>(V * p);
        A *go = scratch.take<A>(o.c);
        A *line = scratch.take<A>(o.c);
        weights(o, n, weight);
        load_matrix(o.grad_out, n, o.c, go);
        for (int64_t c = 0; c < o.c; ++c)
            go[c] /= A(p);
        if (o.grad_x.data && gx_layout == Layout::rows) {
            T *to = sample_of<T>(o.grad_x, n);
            for (int64_t c0 = 0; c0 < o.c; c0 += V) {
                const int64_t count = o.c - c0 < V ? o.c - c0 : V;
                A *result = direct ? reinterpret_cast<A *>(to + c0 * p) : made;
                for (int64_t i = 0; i < count; ++i) {
                    A *row = result + i * p;
                    const A g = go[c0 + i];
                    int64_t q = 0;
                    for (; q + V <= p; q += V)
                        *reinterpret_cast<vec *>(row + q) = *reinterpret_cast<const vec *>(weight + q) * g;
                    for (; q < p; ++q)
                        row[q] = weight[q] * g;
                }
                if (!direct)
                    put_rows(made, to + c0 * p, count * p, past);
            }
        } else if (o.grad_x.data && gx_layout == Layout::channels_last) {
            T *to = sample_of<T>(o.grad_x, n);
            for (int64_t q = 0; q < p; ++q) {
                A *row = direct ? reinterpret_cast<A *>(to + q * o.c) : line;
                for (int64_t c = 0; c < o.c; ++c)
                    row[c] = go[c] * weight[q];
                if (!direct)
                    put_rows(line, to + q * o.c, o.c, past);
            }
        } else if (o.grad_x.data) {
            for (int64_t c0 = 0; c0 < o.c; c0 += V) {
                const int count = int(o.c - c0 < V ? o.c - c0 : V);
                vec g{};
                for (int i = 0; i < count; ++i)
                    g[i] = go[c0 + i];
                for (int64_t q = 0; q < p; ++q)
                    reinterpret_cast<vec *>(tile)[q] = g * weight[q];
                store_tile<T, A>(tile, sample_of<T>(o.grad_x, n), o.grad_x, gx_layout, c0, count, o.c, o.h, o.w, rows);
            }
        }
        if (!o.grad_cmap.data)
            return;
        if (layout == Layout::channels_last) {
            for (int64_t q = 0; q < p; ++q)
                put(o.grad_cmap, n * p + q, dot_row(sample_of<const T>(o.x, n) + q * o.c, go, o.c));
            return;
        }
        for (int64_t i = 0; i < V * p; ++i)
            lanes[i] = 0;
        for (int64_t c0 = 0; c0 < o.c; c0 += V) {
            const int count = int(o.c - c0 < V ? o.c - c0 : V);
            const T *x = sample_of<const T>(o.x, n);
            // Row i adds to its own partial sums, so that a sum over many channels is one of eight short ones.
            if (layout == Layout::rows) {
                for (int i = 0; i < count; ++i)
                    add_row(x + (c0 + i) * p, go[c0 + i], lanes + i * p, p);
                continue;
            }
            const A *from = load_rows<T, A>(x, o.x, layout, c0, count, o.h, o.w, tile);
            for (int i = 0; i < count; ++i)
                add_row(from + i * p, go[c0 + i], lanes + i * p, p);
        }
        for (int64_t q = 0; q < p; ++q) {
            A part[V];
            for (int i = 0; i < V; ++i)
                part[i] = lanes[i * p + q];
            put(o.grad_cmap, n * p + q, total(part));
        }
    });
}

} // namespace

void consensus_pool_forward(const ConsensusPool &o) {
    with_type(o.x.dtype, [&](auto t) { forward<decltype(t)>(o); });
}
void consensus_pool_backward(const ConsensusPool &o) {
    with_type(o.x.dtype, [&](auto t) { backward<decltype(t)>(o); });
}

} // namespace M3EM_ISA
} // namespace m3em
