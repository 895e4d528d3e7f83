// gated_projection: a projection of gated copies is a projection with gated weights, a product for every sample,
//
//   out_n    = F_n x_n          F_n = sum over gates of weight_g diag(gate_g[n])        (D,C)
//   grad_x_n = F_n^T grad_n
//   M_n      = grad_n x_n^T,    grad_weight_g += M_n diag(gate_g[n]),
//                               grad_gate_g[n] = column sums of weight_g times M_n, element by element
//
// which takes half the multiplications of the convolution over gated copies. Neither F_n nor M_n is ever whole: a panel
// of F_n is made in the first-level cache where it is used, and M_n exists as blocks of sums in registers only.
#include "cpu/product.h"

namespace m3em {
namespace M3EM_ISA {
namespace {

// Of these, only the two depths are in the results: sums are made in pieces of so many terms, whatever the rest is.
constexpr int64_t Depth = 128;           // rows of a panel of folded weights
constexpr int64_t Positions = 256;       // terms of one block of M_n
constexpr int64_t Rows = 256;            // rows of M_n that a task goes through all samples with
constexpr int64_t Group = 4;             // samples of 7x7 that share one reading of a block of weights
constexpr int64_t Columns = 128;         // columns of the result that one task makes
constexpr int64_t PanelBytes = 14 << 10; // panels of x that stay in the first-level cache
constexpr int64_t KeptBytes = 512 << 10; // weights and their gradients that a task keeps in the second-level cache

static inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Weights and gates laid out anew, in the accumulation type.
template <class A>
struct Work {
    static constexpr int64_t W = Block<A>::W;
    const int64_t strips, panel; // panels of W columns; numbers of one of them
    const int64_t pitch;         // of a row of gates
    Scratch memory;
    A *const weights; // forward: [gate][strip of D][C][W]; backward: [gate][strip of C][D][W]
    A *const grads;   // backward: like the weights
    A *const gates;   // [sample][gate][pitch], zeros behind C
    A *const sums;    // backward: like the gates, of their gradients

    Work(const GatedProjection &o, bool backward)
        : strips(up(backward ? o.c : o.d, W)), panel((backward ? o.d : o.c) * W), pitch(up(o.c, W) * W),
          memory(int64_t(sizeof(A)) * o.num_gates * (strips * panel + o.n * pitch) * (backward ? 2 : 1) + 4 * 64),
          weights(memory.take<A>(o.num_gates * strips * panel)),
          grads(memory.take<A>(backward ? o.num_gates * strips * panel : 0)),
          gates(memory.take<A>(o.n * o.num_gates * pitch)),
          sums(memory.take<A>(backward ? o.n * o.num_gates * pitch : 0)) {
        memory.check();
    }
    A *weights_at(int g, int64_t strip) const { return weights + (g * strips + strip) * panel; }
    A *grads_at(int g, int64_t strip) const { return grads + (g * strips + strip) * panel; }
    const A *gate(const GatedProjection &o, int64_t n, int g) const { return gates + (n * o.num_gates + g) * pitch; }
    A *gate_sums(const GatedProjection &o, int64_t n, int g) const { return sums + (n * o.num_gates + g) * pitch; }
};

// Numbers from .. from+count of row d of the weight.
template <class A>
static inline void weight_row(const GatedProjection &o, int64_t d, int64_t from, int64_t count, A *to) {
    with_type_of<A>(o.weight.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t step = o.weight.stride[1];
        const T *row = static_cast<const T *>(o.weight.data) + d * o.weight.stride[0] + from * step;
        if (step == 1)
            widen_row(row, to, count);
        else
            for (int64_t i = 0; i < count; ++i)
                to[i] = widen(row[i * step]);
    });
}

template <class A>
void pack_gates(const GatedProjection &o, const Work<A> &work) {
    if (!o.gates[0].data)
        return;
    for_each(o.n * o.num_gates, o.threads, 0, [&](Scratch &, int64_t i) {
        A *to = work.gates + i * work.pitch;
        for (int64_t c = 0; c < work.pitch; ++c)
            to[c] = c < o.c ? matrix_at<A>(o.gates[i % o.num_gates], i / o.num_gates, c) : A(0);
    });
}

template <class A>
void pack_weights(const GatedProjection &o, const Work<A> &work, bool backward) {
    constexpr int64_t W = Block<A>::W;
    if (!o.weight.data)
        return;
    if (backward) {
        for_each(o.d, o.threads, int64_t(sizeof(A)) * work.pitch, [&](Scratch &scratch, int64_t d) {
            A *row = scratch.take<A>(work.pitch);
            for (int g = 0; g < o.num_gates; ++g) {
                for (int64_t c = o.c; c < work.pitch; ++c)
                    row[c] = 0;
                weight_row(o, d, g * o.c, o.c, row);
                for (int64_t s = 0; s < work.strips; ++s)
                    std::memcpy(work.weights_at(g, s) + d * W, row + s * W, W * sizeof(A));
            }
        });
        return;
    }
    for_each(work.strips * W / V, o.threads, int64_t(sizeof(A)) * V * o.c, [&](Scratch &scratch, int64_t eight) {
        A *rows = scratch.take<A>(V * o.c);
        for (int g = 0; g < o.num_gates; ++g) {
            for (int64_t i = 0; i < V; ++i) {
                if (eight * V + i < o.d)
                    weight_row(o, eight * V + i, g * o.c, o.c, rows + i * o.c);
                else
                    std::memset(rows + i * o.c, 0, o.c * sizeof(A));
            }
            transpose_in(rows, o.c, work.weights_at(g, eight * V / W) + eight * V % W, o.c, W);
        }
    });
}

// Rows k0 .. k0+count of one panel of F_n. The gates go with the rows of the panel (forward) or with its columns.
template <class A>
static inline void fold(const GatedProjection &o, const Work<A> &work, bool backward, int64_t n, int64_t strip,
                        int64_t k0, int64_t count, A *panel) {
    using B = Block<A>;
    using vec = typename B::vec;
    const auto at = [](const A *row, int v) { return *reinterpret_cast<const vec *>(row + v * B::L); };
    // Two gates at a time, as most calls have two: the panel is then written once.
    for (int g = 0; g < o.num_gates; g += 2) {
        const bool two = g + 1 < o.num_gates;
        const int h = two ? g + 1 : g;
        const A *from = work.weights_at(g, strip) + k0 * B::W, *other = work.weights_at(h, strip) + k0 * B::W;
        const A *gate = work.gate(o, n, g) + (backward ? strip * B::W : k0);
        const A *second = work.gate(o, n, h) + (backward ? strip * B::W : k0);
        for (int64_t k = 0; k < count; ++k)
            for (int v = 0; v < B::NV; ++v) {
                const int64_t row = k * B::W;
                vec gated = backward ? at(from + row, v) * at(gate, v) : at(from + row, v) * gate[k];
                if (two)
                    gated += backward ? at(other + row, v) * at(second, v) : at(other + row, v) * second[k];
                vec &to = *reinterpret_cast<vec *>(panel + row + v * B::L);
                to = g == 0 ? gated : to + gated;
            }
    }
}

template <class A>
static inline void add_bias(const GatedProjection &o, int64_t j0, int64_t positions, A *sums) {
    constexpr int64_t W = Block<A>::W;
    A bias[W];
    for (int64_t j = 0; j < W; ++j)
        bias[j] = j0 + j < o.d ? element<A>(o.bias, (j0 + j) * o.bias.stride[0]) : A(0);
    for (int64_t q = 0; q < positions; ++q)
        for (int64_t j = 0; j < W; ++j)
            sums[q * W + j] += bias[j];
}

// The forward, and the gradient of x: `in` (N,K,H,W) times the folded weights gives `out` (N,J,H,W).
template <class A>
void project(const GatedProjection &o, const Work<A> &work, bool backward, const Tensor &in, int64_t depth,
             const Tensor &out, int64_t columns) {
    constexpr int64_t W = Block<A>::W;
    const int64_t p = o.h * o.w, group = most(1, least(least(Group, Group * 49 / p), o.n));
    const int64_t per_task = most(1, least(least(Columns, Columns * Group * 49 / (group * p)) / W, work.strips));
    const int64_t groups = up(o.n, group), blocks = up(work.strips, per_task);
    const Layout layout = layout_of(out, columns, o.h, o.w), in_layout = layout_of(in, depth, o.h, o.w);
    const bool past = past_cache(o.n * (o.c + o.d) * p, out.dtype);
    const int64_t numbers = group * per_task * p * W + Depth * W + group * least(Depth, depth) * p + V * p;
    for_each(groups * blocks, o.threads, int64_t(sizeof(A)) * numbers + 4 * 64, [&](Scratch &scratch, int64_t task) {
        const int64_t s0 = task / groups * per_task, n0 = task % groups * group;
        const int64_t strips = least(per_task, work.strips - s0), samples = least(group, o.n - n0);
        A *sums = scratch.take<A>(group * per_task * p * W);
        A *panel = scratch.take<A>(Depth * W);
        A *room = scratch.take<A>(group * least(Depth, depth) * p);
        A *rows = scratch.take<A>(V * p);
        for (int64_t k0 = 0; k0 < depth; k0 += Depth) {
            const int64_t count = least(Depth, depth - k0);
            Operand<A> operands[Group];
            for (int64_t i = 0; i < samples; ++i)
                operands[i] = operand(in, n0 + i, k0, count, depth, o.h, o.w, room + i * least(Depth, depth) * p);
            Ahead ahead;
            const bool more = k0 + Depth < depth;
            for (int64_t i = 0; i < (more ? samples : group); ++i) {
                const int64_t n = more ? n0 + i : n0 + group + i, from = more ? k0 + Depth : 0;
                if (n < o.n)
                    ahead.add(in, in_layout, n, from, least(Depth, depth - from), p);
            }
            ahead.plan(strips * samples);
            for (int64_t s = 0; s < strips; ++s)
                for (int64_t i = 0; i < samples; ++i) {
                    ahead.step();
                    fold(o, work, backward, n0 + i, s0 + s, k0, count, panel);
                    const Operand<A> from = operands[i];
                    A *to = sums + (i * per_task + s) * p * W;
                    for_rows<A>(p, [&](auto block, int64_t first) __attribute__((always_inline)) {
                        if (k0)
                            block.load(to + first * W);
                        else
                            block.clear();
                        block.multiply(from.data + first * from.step, from.step, from.row, panel, count);
                        block.store(to + first * W);
                    });
                }
        }
        for (int64_t i = 0; i < samples; ++i)
            for (int64_t s = 0; s < strips; ++s) {
                A *to = sums + (i * per_task + s) * p * W;
                if (!backward && o.bias.data)
                    add_bias(o, (s0 + s) * W, p, to);
                with_type_of<A>(out.dtype, [&](auto type) {
                    using T = decltype(type);
                    for (int64_t j = 0; j < W && (s0 + s) * W + j < columns; j += V) {
                        const int64_t j0 = (s0 + s) * W + j;
                        store_tile(to + j, sample_of<T>(out, n0 + i), out, layout, j0, int(least(V, columns - j0)),
                                   columns, o.h, o.w, rows, W, past);
                    }
                });
            }
    });
}

// W channels of one sample of x as a panel, zeros behind C.
template <class A>
static inline void load_panel(const GatedProjection &o, int64_t n, int64_t c0, Layout layout, A *rows, A *panel) {
    constexpr int64_t W = Block<A>::W;
    with_type_of<A>(o.x.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t part = 0; part < W; part += V) {
            const int64_t there = most(0, least(V, o.c - c0 - part));
            load_tile(sample_of<T>(o.x, n), o.x, layout, there ? c0 + part : 0, int(there), o.c, o.h, o.w, rows,
                      panel + part, W);
        }
    });
}

// M_n for one panel of x of each of `count` samples, added to the gradients as soon as a block of it is there. The
// samples take turns at a block of weights and their gradients, which stays in the first-level cache for them.
template <class A>
static inline void outer_panels(const GatedProjection &o, const Work<A> &work, const Operand<A> *grads, const A *panels,
                                int64_t n0, int64_t count, int64_t strip, int64_t d0, int64_t rows, Ahead &ahead) {
    constexpr int64_t W = Block<A>::W;
    const int64_t p = o.h * o.w;
    for (int64_t p0 = 0; p0 < p; p0 += Positions)
        for_rows<A>(rows, [&](auto block, int64_t row) __attribute__((always_inline)) {
            const int64_t d = d0 + row;
            for (int64_t i = 0; i < count; ++i) {
                const Operand<A> &grad = grads[i];
                ahead.step();
                block.clear();
                block.multiply(grad.data + row * grad.row + p0 * grad.step, grad.row, grad.step,
                               panels + (i * p + p0) * W, least(Positions, p - p0));
                for (int g = 0; g < o.num_gates; ++g) {
                    if (o.grad_weight.data)
                        block.add_scaled(work.gate(o, n0 + i, g) + strip * W, work.grads_at(g, strip) + d * W);
                    if (o.grad_gates[g].data)
                        block.add_products(work.weights_at(g, strip) + d * W, work.gate_sums(o, n0 + i, g) + strip * W);
                }
            }
        });
}

// Gradients of the weight and of the gates. One task is a block of channels, which sees all samples in their order, and
// all of them again for the next rows of M_n: the weights and gradients of those rows and channels, what the samples of
// a group have there and what is fetched for the next group fit the second-level cache together.
template <class A>
void outer(const GatedProjection &o, const Work<A> &work) {
    constexpr int64_t W = Block<A>::W;
    const int64_t p = o.h * o.w, strip_bytes = 2 * o.num_gates * least(Rows, o.d) * W * int64_t(sizeof(A));
    const int64_t per_task = most(1, least(4, KeptBytes / strip_bytes)), tasks = up(work.strips, per_task);
    const int64_t group = most(1, least(least(Group, PanelBytes / (p * W * int64_t(sizeof(A)))), o.n));
    const int64_t bytes = int64_t(sizeof(A)) * (group * (p * W + least(Rows, o.d) * p) + V * p) + 4 * 64;
    const Layout layout = layout_of(o.x, o.c, o.h, o.w), grad_layout = layout_of(o.grad_out, o.d, o.h, o.w);
    for_each(tasks, o.threads, bytes, [&](Scratch &scratch, int64_t task) {
        const int64_t s0 = task * per_task, s1 = least(work.strips, s0 + per_task);
        A *panels = scratch.take<A>(group * p * W);
        A *rows = scratch.take<A>(V * p);
        A *room = scratch.take<A>(group * least(Rows, o.d) * p);
        for (int g = 0; o.grad_weight.data && g < o.num_gates; ++g)
            std::memset(work.grads_at(g, s0), 0, (s1 - s0) * work.panel * sizeof(A));
        for (int64_t i = 0; i < o.n * o.num_gates; ++i)
            std::memset(work.gate_sums(o, 0, 0) + i * work.pitch + s0 * W, 0, (s1 - s0) * W * sizeof(A));
        for (int64_t d0 = 0; d0 < o.d; d0 += Rows)
            for (int64_t n0 = 0; n0 < o.n; n0 += group) {
                const int64_t count = least(group, o.n - n0), those = least(Rows, o.d - d0);
                Operand<A> grads[Group];
                for (int64_t i = 0; i < count; ++i)
                    grads[i] = operand(o.grad_out, n0 + i, d0, those, o.d, o.h, o.w, room + i * least(Rows, o.d) * p);
                for (int64_t s = s0; s < s1; ++s) {
                    for (int64_t i = 0; i < count; ++i)
                        load_panel(o, n0 + i, s * W, layout, rows, panels + i * p * W);
                    // The next panels of x, and of the next group's gradients this strip's share.
                    Ahead ahead;
                    const int64_t next = s + 1 < s1 ? n0 : n0 + group, strip = s + 1 < s1 ? s + 1 : s0;
                    for (int64_t i = 0; i < least(group, o.n - next); ++i)
                        ahead.add(o.x, layout, next + i, strip * W, least(W, o.c - strip * W), p);
                    for (int64_t i = s - s0; i < least(group, o.n - n0 - group); i += s1 - s0)
                        ahead.add(o.grad_out, grad_layout, n0 + group + i, d0, those, p);
                    ahead.plan(up(those, Block<A>::R) * up(p, Positions) * count);
                    outer_panels(o, work, grads, panels, n0, count, s, d0, those, ahead);
                }
            }
        for (int64_t n = 0; n < o.n; ++n)
            for (int g = 0; g < o.num_gates; ++g)
                for (int64_t c = s0 * W; o.grad_gates[g].data && c < least(s1 * W, o.c); ++c)
                    put_matrix(o.grad_gates[g], n, c, work.gate_sums(o, n, g)[c]);
    });
    if (!o.grad_weight.data)
        return;
    for_each(o.d, o.threads, 0, [&](Scratch &, int64_t d) {
        for (int g = 0; g < o.num_gates; ++g)
            for (int64_t s = 0; s < work.strips; ++s) {
                const A *from = work.grads_at(g, s) + d * W;
                for (int64_t c = 0; c < least(W, o.c - s * W); ++c)
                    put_matrix(o.grad_weight, d, g * o.c + s * W + c, from[c]);
            }
    });
}

template <class A>
void bias(const GatedProjection &o) {
    const int64_t p = o.h * o.w;
    const Layout layout = layout_of(o.grad_out, o.d, o.h, o.w);
    for_each(o.d, o.threads, int64_t(sizeof(A)) * 2 * p + 64, [&](Scratch &scratch, int64_t d) {
        A *room = scratch.take<A>(p);
        A *ones = scratch.take<A>(p);
        for (int64_t i = 0; i < p; ++i)
            ones[i] = 1;
        double sum = 0; // over all samples: too many terms for a float
        with_type_of<A>(o.grad_out.dtype, [&](auto type) {
            using T = decltype(type);
            for (int64_t n = 0; n < o.n; ++n)
                sum +=
                    dot_row(load_rows(sample_of<T>(o.grad_out, n), o.grad_out, layout, d, 1, o.h, o.w, room), ones, p);
        });
        put(o.grad_bias, d * o.grad_bias.stride[0], A(sum));
    });
}

template <class A>
void forward(const GatedProjection &o) {
    const Work<A> work(o, false);
    pack_gates(o, work);
    pack_weights(o, work, false);
    project(o, work, false, o.x, o.c, o.out, o.d);
}

template <class A>
void backward(const GatedProjection &o) {
    const Work<A> work(o, true);
    pack_gates(o, work);
    pack_weights(o, work, true);
    bool others = o.grad_weight.data;
    for (int g = 0; g < o.num_gates; ++g)
        others = others || o.grad_gates[g].data;
    if (o.grad_x.data)
        project(o, work, true, o.grad_out, o.d, o.grad_x, o.c);
    if (others)
        outer(o, work);
    if (o.grad_bias.data)
        bias<A>(o);
}

} // namespace

void gated_projection_forward(const GatedProjection &o) {
    o.weight.dtype == Dtype::f64 ? forward<double>(o) : forward<float>(o);
}
void gated_projection_backward(const GatedProjection &o) {
    o.weight.dtype == Dtype::f64 ? backward<double>(o) : backward<float>(o);
}

} // namespace M3EM_ISA
} // namespace m3em
