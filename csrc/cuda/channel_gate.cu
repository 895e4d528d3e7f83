// channel_gate on a card: one read of x, one write of every gated copy; backward, one read of x and of the copies'
// gradients.
//
// A block takes a chunk of the channels of one sample. Where channels lie one after another in whole packs it walks
// over them 16 bytes at a time (form `packs`, gate_packs.cuh). In the form `any`, lanes take the positions of a channel
// where those lie one after another (gate_lines.cuh). In any other memory, channels_last above all, a thread takes a
// channel and walks over the positions, so that neighbouring threads read neighbouring numbers. Sums over positions
// (the gradients of the gates) have one order in each of these ways, whatever else is in the batch.
#include "cuda/gate_lines.cuh"
#include "cuda/gate_packs.cuh"

namespace m3em {
namespace {

template <class T>
__device__ void forward(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    M3EM_SHARED(memory);
    A *gates = reinterpret_cast<A *>(memory);
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    load_gates<T>(m, part, gates);
    if (m.lanes)
        return m.wide ? forward_lines<T, A>(m, part, gates) : forward_lines<T, T>(m, part, gates);
    const T *x = sample_of<const T>(m.x, part.n, part.c0);
#pragma unroll 1
    for (int i = threadIdx.x; i < part.count * p; i += GateThreads) {
        const int slow = i / (m.across ? part.count : p), fast = i - slow * (m.across ? part.count : p);
        const int q = m.across ? slow : fast, c = m.across ? fast : slow, row = q / m.w, column = q - row * m.w;
        const A from = widen(x[c * m.x.stride[1] + row * m.x.stride[2] + column * m.x.stride[3]]);
        const long long to = part.n * m.out.stride[0] + (part.c0 + c) * m.out.stride[1] + row * m.out.stride[2] +
                             column * m.out.stride[3];
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g)
            write<T, A>(m.out.data, to + (long long)g * m.c * m.out.stride[1], m.wide,
                        from * gates[g * part.count + c]);
    }
}

template <class T>
__device__ void backward(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    M3EM_SHARED(memory);
    A *gates = reinterpret_cast<A *>(memory);
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    load_gates<T>(m, part, gates);
    A *sums = gates + m.num_gates * m.chunk;
    if (m.lanes)
        return m.wide ? backward_lines<T, A>(m, part, gates, sums) : backward_lines<T, T>(m, part, gates, sums);
#pragma unroll 1
    for (int c = threadIdx.x; c < part.count; c += GateThreads) {
        const T *x = m.x.data ? sample_of<const T>(m.x, part.n, part.c0 + c) : nullptr;
        T *gx = m.grad_x.data ? sample_of<T>(m.grad_x, part.n, part.c0 + c) : nullptr;
        for (int g = 0; g < m.num_gates; ++g)
            sums[g * m.chunk + c] = 0; // this thread's own
#pragma unroll 1
        for (int q = 0; q < p; ++q) {
            const int row = q / m.w, column = q - row * m.w;
            const A from = x ? widen(x[row * m.x.stride[2] + column * m.x.stride[3]]) : A(0);
            A grad = 0;
#pragma unroll 1
            for (int g = 0; g < m.num_gates; ++g) {
                const long long *s = m.grad_out.stride;
                const long long at = part.n * s[0] + ((long long)g * m.c + part.c0 + c) * s[1];
                const A value = read<T, A>(m.grad_out.data, at + row * s[2] + column * s[3], m.wide);
                grad += value * gates[g * part.count + c];
                sums[g * m.chunk + c] += value * from;
            }
            if (gx)
                gx[row * m.grad_x.stride[2] + column * m.grad_x.stride[3]] = narrow<T>(grad);
        }
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g)
            if (m.grads[g].data)
                write_gate<T>(m, g, part.n, part.c0 + c, sums[g * m.chunk + c]);
    }
}

} // namespace
} // namespace m3em

#define M3EM_CHANNEL_GATE(dtype, T, form, forward, backward)                                                           \
    M3EM_KERNEL(channel_gate_forward_##dtype##_##form, m3em::GateThreads, m3em::GateBlocks,                            \
                m3em::ChannelGateArguments, m3em::forward<T>)                                                          \
    M3EM_KERNEL(channel_gate_backward_##dtype##_##form, m3em::GateThreads, m3em::GateBackwardBlocks,                   \
                m3em::ChannelGateArguments, m3em::backward<T>)

M3EM_CHANNEL_GATE(f32, float, packs, forward_packs, backward_packs)
M3EM_CHANNEL_GATE(f16, __half, packs, forward_packs, backward_packs)
M3EM_CHANNEL_GATE(bf16, __nv_bfloat16, packs, forward_packs, backward_packs)
M3EM_CHANNEL_GATE(f64, double, any, forward, backward)
M3EM_CHANNEL_GATE(f32, float, any, forward, backward)
M3EM_CHANNEL_GATE(f16, __half, any, forward, backward)
M3EM_CHANNEL_GATE(bf16, __nv_bfloat16, any, forward, backward)
