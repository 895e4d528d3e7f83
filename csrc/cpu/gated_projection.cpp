// gated_projection: the two steps around torch's matrix product, for one or two samples at a time, so that what they
// make stays in the cache.
//
//   fold:    matrix_n = sum over gates of weight_g * diag(gate_g[n])        then  out_n = matrix_n * x_n
//   unfold:  from M_n = grad_out_n * x_n^T,  grad_weight_g += M_n * diag(gate_g[n]),
//            grad_gate_g[n] = column sums of weight_g times M_n, element by element
#include "cpu/tile.h"

namespace m3em {
namespace M3EM_ISA {
namespace {

template <class T>
void fold(const GatedProjection &o) {
    using A = typename acc_of<T>::type;
    const int64_t all = o.num_gates * o.c;
    // Gates first, as rows of numbers in the accumulation type, shared by all rows of the weight.
    Scratch shared(int64_t(sizeof(A)) * o.m * all);
    A *gates = shared.take<A>(o.m * all);
    for (int64_t i = 0; i < o.m; ++i)
        for (int g = 0; g < o.num_gates; ++g)
            for (int64_t c = 0; c < o.c; ++c)
                gates[i * all + g * o.c + c] = matrix_at<A>(o.gates[g], o.first + i, c);
    for_each(o.d, o.threads, int64_t(sizeof(A)) * all + 64, [&](Scratch &scratch, int64_t d) {
        A *row = scratch.take<A>(all);
        const T *weight = static_cast<const T *>(o.weight.data) + d * o.weight.stride[0];
        if (o.weight.stride[1] == 1)
            widen_row(weight, row, all);
        else
            for (int64_t i = 0; i < all; ++i)
                row[i] = widen(weight[i * o.weight.stride[1]]);
        for (int64_t i = 0; i < o.m; ++i) {
            A *out = static_cast<A *>(o.matrix) + (i * o.d + d) * o.c;
            for (int64_t c = 0; c < o.c; ++c)
                out[c] = row[c] * gates[i * all + c];
            for (int g = 1; g < o.num_gates; ++g) {
                const A *gate = gates + i * all + g * o.c, *from = row + g * o.c;
                for (int64_t c = 0; c < o.c; ++c)
                    out[c] += from[c] * gate[c];
            }
        }
    });
}

template <class T>
void unfold(const GatedProjection &o) {
    using A = typename acc_of<T>::type;
    const int64_t all = o.num_gates * o.c;
    // One task is a block of channels in every row of the matrices: all samples and gates meet it while it is in the
    // cache, and no two tasks add to the same number.
    constexpr int64_t Block = 64;
    const int64_t blocks = (o.c + Block - 1) / Block, sums = o.m * o.num_gates * Block;
    const int64_t bytes = int64_t(sizeof(A)) * (2 * sums + Block) + 3 * 64;
    for_each(blocks, o.threads, bytes, [&](Scratch &scratch, int64_t task) {
        const int64_t c0 = task * Block, count = o.c - c0 < Block ? o.c - c0 : Block;
        A *gate = scratch.take<A>(sums);
        A *sum = scratch.take<A>(sums);
        A *row = scratch.take<A>(Block);
        for (int64_t i = 0; i < o.m; ++i)
            for (int g = 0; g < o.num_gates; ++g)
                for (int64_t c = 0; c < count; ++c) {
                    const int64_t at = (i * o.num_gates + g) * Block + c;
                    gate[at] = o.grad_weight ? matrix_at<A>(o.gates[g], o.first + i, c0 + c) : A(0);
                    sum[at] = 0;
                }
        for (int64_t d = 0; d < o.d; ++d) {
            const A *product = static_cast<const A *>(o.matrix) + d * o.c + c0;
            for (int g = 0; g < o.num_gates; ++g) {
                if (o.grad_weight) {
                    A *to = static_cast<A *>(o.grad_weight) + d * all + g * o.c + c0;
                    for (int64_t i = 0; i < o.m; ++i) {
                        const A *from = product + i * o.d * o.c, *factor = gate + (i * o.num_gates + g) * Block;
                        for (int64_t c = 0; c < count; ++c)
                            to[c] += from[c] * factor[c];
                    }
                }
                if (!o.grad_gates[g].data)
                    continue;
                const T *weight = static_cast<const T *>(o.weight.data) + d * o.weight.stride[0] +
                                  (g * o.c + c0) * o.weight.stride[1];
                if (o.weight.stride[1] == 1)
                    widen_row(weight, row, count);
                else
                    for (int64_t c = 0; c < count; ++c)
                        row[c] = widen(weight[c * o.weight.stride[1]]);
                for (int64_t i = 0; i < o.m; ++i) {
                    const A *from = product + i * o.d * o.c;
                    A *to = sum + (i * o.num_gates + g) * Block;
                    for (int64_t c = 0; c < count; ++c)
                        to[c] += row[c] * from[c];
                }
            }
        }
        for (int64_t i = 0; i < o.m; ++i)
            for (int g = 0; g < o.num_gates; ++g)
                for (int64_t c = 0; o.grad_gates[g].data && c < count; ++c)
                    put_matrix(o.grad_gates[g], o.first + i, c0 + c, sum[(i * o.num_gates + g) * Block + c]);
    });
}

} // namespace

void gated_projection_fold(const GatedProjection &o) {
    with_type(o.weight.dtype, [&](auto t) { fold<decltype(t)>(o); });
}
void gated_projection_unfold(const GatedProjection &o) {
    with_type(o.weight.dtype, [&](auto t) { unfold<decltype(t)>(o); });
}

} // namespace M3EM_ISA
} // namespace m3em
