// channel_gate on a card: one read of x, one write of every gated copy; backward, one read of x and of the copies'
// gradients.
//
// A block takes a chunk of the channels of one sample. Where channels lie one after another in whole packs it walks
// over them 16 bytes at a time (form `packs`, gate_packs.cuh). The form `any` knows three ways: in channels_last memory
// of whole packs a thread takes a pack of channels and walks over the positions (gate_last.cuh); where the positions of
// a channel lie one after another, lanes take them (gate_lines.cuh); in any other memory a thread takes one channel, so
// that neighbouring threads read neighbouring numbers. Sums over positions (the gradients of the gates) have one order
// in each of these ways, whatever else is in the batch.
#include "cuda/gate_last.cuh"
#include "cuda/gate_lines.cuh"
#include "cuda/gate_packs.cuh"

namespace m3em {
namespace {

template <class T>
__device__ void forward(const ChannelGateArguments &m) {
    if constexpr (sizeof(T) < 8)
        if (m.last)
            return forward_last<T>(m);
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
    if constexpr (sizeof(T) < 8)
        if (m.last)
            return m.num_gates == 2 ? backward_last<T, 2>(m) : backward_last<T, 1>(m);
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

#define M3EM_CHANNEL_GATE(name, blocks, ...)                                                                           \
    M3EM_KERNEL(channel_gate_##name, m3em::GateThreads, blocks, m3em::ChannelGateArguments, __VA_ARGS__)
#define M3EM_CHANNEL_GATE_PACKS(dtype, T)                                                                              \
    M3EM_CHANNEL_GATE(forward_##dtype##_packs, m3em::GateBlocks, m3em::forward_packs<T>)                               \
    M3EM_CHANNEL_GATE(backward_##dtype##_packs, m3em::GateBlocks, m3em::backward_packs<T>)
#define M3EM_CHANNEL_GATE_ANY(dtype, T)                                                                                \
    M3EM_CHANNEL_GATE(forward_##dtype##_any, m3em::GateBlocks, m3em::forward<T>)                                       \
    M3EM_CHANNEL_GATE(backward_##dtype##_any, m3em::GateBackwardBlocks, m3em::backward<T>)

M3EM_CHANNEL_GATE_PACKS(f32, float)
M3EM_CHANNEL_GATE_PACKS(f16, __half)
M3EM_CHANNEL_GATE_PACKS(bf16, __nv_bfloat16)
M3EM_CHANNEL_GATE_ANY(f64, double)
M3EM_CHANNEL_GATE_ANY(f32, float)
M3EM_CHANNEL_GATE_ANY(f16, __half)
M3EM_CHANNEL_GATE_ANY(bf16, __nv_bfloat16)
