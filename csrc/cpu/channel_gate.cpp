// channel_gate: one read of x, one write of every gated copy; backward, one read of x and of the copies' gradients.
//
// Two ways through a sample. Where the positions of a channel lie together, a block of channels is a run of memory and
// every channel has one factor. In channels_last the channels lie together, and a tile of eight has a vector of
// factors.
#include "cpu/rows.h"

namespace m3em {
namespace M3EM_ISA {
namespace {

constexpr int64_t B = 16; // channels of a block

template <class T>
void forward(const ChannelGate &o) {
    using A = typename acc_of<T>::type;
    using vec = typename vec_of<A>::type;
    const int64_t p = o.h * o.w, all = o.num_gates * o.c;
    const Layout layout = layout_of(o.x, o.c, o.h, o.w), out_layout = layout_of(o.out, all, o.h, o.w);
    const bool past = past_cache(o.n * (o.c + all) * p, o.x.dtype);
    const bool direct = sizeof(T) == sizeof(A) && !past;
    const int64_t bytes = int64_t(sizeof(A)) * (all + 2 * B * p) + 3 * 64;
    for_each(o.n, o.threads, bytes, [&](Scratch &scratch, int64_t n) {
        A *gates = scratch.take<A>(all);
        A *in = scratch.take<A>(B * p);
        A *made = scratch.take<A>(B * p);
        for (int g = 0; g < o.num_gates; ++g)
            load_matrix(o.gates[g], n, o.c, gates + g * o.c);
        const T *x = sample_of<const T>(o.x, n);
        T *out = sample_of<T>(o.out, n);
        if (out_layout == Layout::channels_last) { // and so is x, whose format the result has
            for (int64_t q = 0; q < p; ++q) {
                const int64_t y = q / o.w;
                const T *from = x + y * o.x.stride[2] + (q - y * o.w) * o.x.stride[3];
                for (int64_t c0 = 0; c0 < o.c; c0 += B * p) {
                    const int64_t count = o.c - c0 < B * p ? o.c - c0 : B * p;
                    widen_row(from + c0, in, count);
                    for (int g = 0; g < o.num_gates; ++g) {
                        const A *gate = gates + g * o.c + c0;
                        for (int64_t i = 0; i < count; ++i)
                            made[i] = in[i] * gate[i];
                        narrow_row(made, out + q * all + g * o.c + c0, count);
                    }
                }
            }
            return;
        }
        for (int64_t c0 = 0; c0 < o.c; c0 += B) {
            const int64_t count = o.c - c0 < B ? o.c - c0 : B;
            const A *rows = load_rows<T, A>(x, o.x, layout, c0, count, o.h, o.w, in);
            for (int g = 0; g < o.num_gates; ++g) {
                T *to = out + (g * o.c + c0) * p;
                A *result = direct ? reinterpret_cast<A *>(to) : made;
                for (int64_t i = 0; i < count; ++i) {
                    const A gate = gates[g * o.c + c0 + i];
                    const A *from = rows + i * p;
                    A *row = result + i * p;
                    int64_t q = 0;
                    for (; q + V <= p; q += V)
                        *reinterpret_cast<vec *>(row + q) = *reinterpret_cast<const vec *>(from + q) * gate;
                    for (; q < p; ++q)
                        row[q] = from[q] * gate;
                }
                if (!direct)
                    put_rows(made, to, count * p, past);
            }
        }
    });
}

template <class T>
void backward(const ChannelGate &o) {
    using A = typename acc_of<T>::type;
    using vec = typename vec_of<A>::type;
    const int64_t p = o.h * o.w, all = o.num_gates * o.c;
    const Layout layout = layout_of(o.x, o.c, o.h, o.w), go_layout = layout_of(o.grad_out, all, o.h, o.w);
    const Layout gx_layout = layout_of(o.grad_x, o.c, o.h, o.w);
    bool needs_x = false; // the gradients of the gates need x
    for (int g = 0; g < o.num_gates; ++g)
        needs_x |= o.grad_gates[g].data != nullptr;
    const bool past = past_cache(o.n * (all + (needs_x ? 2 : 1) * o.c) * p, o.x.dtype);
    const bool direct = sizeof(T) == sizeof(A) && !past;
    const int64_t bytes = int64_t(sizeof(A)) * (all + 4 * V * p) + 6 * 64;
    for_each(o.n, o.threads, bytes, [&](Scratch &scratch, int64_t n) {
        A *gates = scratch.take<A>(all);
        A *rows = scratch.take<A>(V * p);
        A *tile_x = scratch.take<A>(V * p);
        A *tile_go = scratch.take<A>(V * p);
        A *tile_gx = scratch.take<A>(V * p);
        for (int g = 0; g < o.num_gates; ++g)
            if (o.gates[g].data)
                load_matrix(o.gates[g], n, o.c, gates + g * o.c);
            else // only the gradient of x would need it
                std::memset(gates + g * o.c, 0, o.c * sizeof(A));
        const bool by_rows = layout == Layout::rows && go_layout == Layout::rows;
        for (int64_t c0 = 0; c0 < o.c; c0 += V) {
            const int count = int(o.c - c0 < V ? o.c - c0 : V);
            if (by_rows) {
                const T *x = needs_x ? sample_of<const T>(o.x, n) + c0 * p : nullptr;
                T *to = o.grad_x.data ? sample_of<T>(o.grad_x, n) + c0 * p : nullptr;
                A *gx = to && direct ? reinterpret_cast<A *>(to) : tile_gx;
                for (int g = 0; g < o.num_gates; ++g) {
                    const T *go = sample_of<const T>(o.grad_out, n) + (g * o.c + c0) * p;
                    for (int i = 0; i < count; ++i) {
                        const A gate = gates[g * o.c + c0 + i];
                        const T *from = go + i * p;
                        A *row = gx + i * p;
                        if (o.grad_gates[g].data)
                            put_matrix(o.grad_gates[g], n, c0 + i, dot_two(from, x + i * p, p));
                        if (!to)
                            continue;
                        int64_t q = 0;
                        for (; q + V <= p; q += V) {
                            vec part;
                            widen_eight(from + q, part);
                            part *= gate;
                            vec *at = reinterpret_cast<vec *>(row + q);
                            *at = g ? *at + part : part;
                        }
                        for (; q < p; ++q)
                            row[q] = g ? row[q] + widen(from[q]) * gate : widen(from[q]) * gate;
                    }
                }
                if (to && !direct)
                    put_rows(tile_gx, to, count * p, past);
                continue;
            }
            if (needs_x)
                load_tile<T, A>(sample_of<const T>(o.x, n), o.x, layout, c0, count, o.c, o.h, o.w, rows, tile_x);
            for (int g = 0; g < o.num_gates; ++g) {
                load_tile<T, A>(sample_of<const T>(o.grad_out, n), o.grad_out, go_layout, g * o.c + c0, count, all, o.h,
                                o.w, rows, tile_go);
                vec gate{}, sum{};
                for (int i = 0; i < count; ++i)
                    gate[i] = gates[g * o.c + c0 + i];
                const vec *x = reinterpret_cast<const vec *>(tile_x);
                const vec *go = reinterpret_cast<const vec *>(tile_go);
                vec *gx = reinterpret_cast<vec *>(tile_gx);
                for (int64_t q = 0; q < p; ++q)
                    gx[q] = g ? gx[q] + go[q] * gate : go[q] * gate;
                if (!o.grad_gates[g].data)
                    continue;
                for (int64_t q = 0; q < p; ++q)
                    sum += go[q] * x[q];
                for (int i = 0; i < count; ++i)
                    put_matrix(o.grad_gates[g], n, c0 + i, sum[i]);
            }
            if (o.grad_x.data)
                store_tile<T, A>(tile_gx, sample_of<T>(o.grad_x, n), o.grad_x, gx_layout, c0, count, o.c, o.h, o.w,
                                 rows, V, past);
        }
    });
}

} // namespace

void channel_gate_forward(const ChannelGate &o) {
    with_type(o.x.dtype, [&](auto t) { forward<decltype(t)>(o); });
}
void channel_gate_backward(const ChannelGate &o) {
    with_type(o.x.dtype, [&](auto t) { backward<decltype(t)>(o); });
}

} // namespace M3EM_ISA
} // namespace m3em
