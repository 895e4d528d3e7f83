// channel_gate on a card: one read of x, one write of every gated copy; backward, one read of x and of the copies'
// gradients.
//
// A block takes a chunk of the channels of one sample. Where channels lie one after another it walks over them 16 bytes
// at a time: in whole packs only (form `packs`, gate_packs.cuh), or as far as packs go (form `any`). In any other
// memory, channels_last above all, a thread takes a channel and walks over the positions, so that neighbouring threads
// read neighbouring numbers. Sums over positions (the gradients of the gates) have one order in each of these ways,
// whatever else is in the batch.
#include "cuda/gate_packs.cuh"
#include "cuda/slab.cuh"

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
    const T *x = sample_of<const T>(m.x, part.n, part.c0);
    if (m.rows) {
        const long long copy = (long long)m.c * p; // from one gated copy to the next
        T *out = sample_of<T>(m.out, part.n, part.c0);
        const bool fit = wide(x) && wide(out) && copy * sizeof(T) % 16 == 0;
        for_slab<T, GateThreads>(part.count * p, p, fit, [&](auto some, int i, Place place) {
            constexpr int E = decltype(some)::value;
            const Few<T, E> from = load<E>(x + i);
#pragma unroll 1
            for (int g = 0; g < m.num_gates; ++g) {
                const A *gate = gates + g * part.count + place.c;
                const A first = gate[0], second = place.left < E ? gate[1] : first;
                Few<T, E> made;
#pragma unroll
                for (int e = 0; e < E; ++e)
                    made.at[e] = narrow<T>(widen(from.at[e]) * (e < place.left ? first : second));
                store<E>(out + g * copy + i, made);
            }
        });
        return;
    }
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

// A tile of channels, or a segment of one, whose memory lies together: the gradient of x, and products for the gates'.
template <class T, class A>
__device__ void backward_tile(const ChannelGateArguments &m, const Part &part, int first, int count, int p, int p0,
                              int positions, const A *gates, A *products, int pitch) {
    const long long copy = (long long)m.c * p;
    const T *x = m.x.data ? sample_of<const T>(m.x, part.n, part.c0 + first) + p0 : nullptr;
    const T *go = sample_of<const T>(m.grad_out, part.n, part.c0 + first) + p0;
    T *gx = m.grad_x.data ? sample_of<T>(m.grad_x, part.n, part.c0 + first) + p0 : nullptr;
    const bool fit = wide(x) && wide(go) && wide(gx) && copy * sizeof(T) % 16 == 0;
    for_slab<T, GateThreads>(count * positions, positions, fit, [&](auto some, int i, Place place) {
        constexpr int E = decltype(some)::value;
        Few<T, E> from{};
        if (x)
            from = load<E>(x + i);
        A sums[E] = {};
        const A *gate = gates + first + place.c;
        A *to = products + place.c * pitch + place.q;
        const T *at = go + i;
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g, gate += part.count, to += m.tile * pitch, at += copy) {
            const Few<T, E> grad = load<E>(at);
            const A one = gate[0], next = place.left < E ? gate[1] : one;
            A *over = to + pitch - positions; // a row of products is longer than its positions
            const bool needed = m.grads[g].data != nullptr;
#pragma unroll
            for (int e = 0; e < E; ++e) {
                const A value = widen(grad.at[e]);
                sums[e] += value * (e < place.left ? one : next);
                if (needed)
                    (e < place.left ? to : over)[e] = value * widen(from.at[e]);
            }
        }
        if (!gx)
            return;
        Few<T, E> made;
#pragma unroll
        for (int e = 0; e < E; ++e)
            made.at[e] = narrow<T>(sums[e]);
        store<E>(gx + i, made);
    });
}

template <class T>
__device__ void backward(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    M3EM_SHARED(memory);
    A *gates = reinterpret_cast<A *>(memory);
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    load_gates<T>(m, part, gates);
    A *sums = gates + m.num_gates * m.chunk, *products = sums + m.num_gates * m.chunk;
    if (m.rows) {
        const int pitch = odd(m.segment), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
        for (int first = 0; first < part.count; first += m.tile) {
            const int count = part.count - first < m.tile ? part.count - first : m.tile;
#pragma unroll 1
            for (int p0 = 0; p0 < p; p0 += m.segment) {
                const int positions = p - p0 < m.segment ? p - p0 : m.segment;
                backward_tile<T>(m, part, first, count, p, p0, positions, gates, products, pitch);
                __syncthreads();
#pragma unroll 1
                for (int item = warp; item < m.num_gates * count; item += GateThreads / 32) {
                    const int g = item / count, c = item - g * count;
                    if (!m.grads[g].data)
                        continue;
                    const A *row = products + (g * m.tile + c) * pitch;
                    A sum = 0;
#pragma unroll 2
                    for (int q = lane; q < positions; q += 32)
                        sum += row[q];
                    sum = warp_sum(sum);
                    if (lane == 0) {
                        A *all = sums + g * m.chunk + first + c;
                        *all = p0 ? *all + sum : sum;
                        if (p0 + positions == p)
                            write_gate<T>(m, g, part.n, part.c0 + first + c, *all);
                    }
                }
                __syncthreads();
            }
        }
        return;
    }
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
    M3EM_KERNEL(channel_gate_backward_##dtype##_##form, m3em::GateThreads, m3em::GateBlocks,                           \
                m3em::ChannelGateArguments, m3em::backward<T>)

M3EM_CHANNEL_GATE(f32, float, packs, forward_packs, backward_packs)
M3EM_CHANNEL_GATE(f16, __half, packs, forward_packs, backward_packs)
M3EM_CHANNEL_GATE(bf16, __nv_bfloat16, packs, forward_packs, backward_packs)
M3EM_CHANNEL_GATE(f64, double, any, forward, backward)
M3EM_CHANNEL_GATE(f32, float, any, forward, backward)
M3EM_CHANNEL_GATE(f16, __half, any, forward, backward)
M3EM_CHANNEL_GATE(bf16, __nv_bfloat16, any, forward, backward)
