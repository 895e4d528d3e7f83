// channel_gate's form `any` for channels_last memory of whole packs. A thread has the same channels at all its
// positions.
#pragma once

#include "cuda/gate_packs.cuh"
#include "cuda/last_packs.cuh"

namespace m3em {
namespace {

// Four positions are under way at a time.
template <class T>
__device__ inline void forward_last(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int Wide = 16 / sizeof(T), Ahead = 4;
    M3EM_SHARED(memory);
    A *gates = reinterpret_cast<A *>(memory);
    const Part part(m.chunk, m.chunks, m.c);
    load_gates<T>(m, part, gates);
    const int p = m.h * m.w;
    const Across across(part.count / Wide, m.last);
    const long long in = across.groups * step_of(m.x, m.w), to = across.groups * step_of(m.out, m.w);
    const long long copy = m.c * m.out.stride[1];
    const T *x = sample_of<const T>(m.x, part.n, part.c0) + across.group * step_of(m.x, m.w) + across.pack * Wide;
    T *out = sample_of<T>(m.out, part.n, part.c0) + across.group * step_of(m.out, m.w) + across.pack * Wide;
    int left = across.walks ? p - across.group : 0; // positions from the thread's next one on
#pragma unroll 1
    for (; left > 0; left -= Ahead * across.groups, x += Ahead * in, out += Ahead * to) {
        Words from[Ahead];
#pragma unroll
        for (int s = 0; s < Ahead; ++s)
            if (left > s * across.groups)
                from[s] = load_words(x + s * in);
        const A *gate = gates + across.pack * Wide;
        T *at = out;
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g, gate += part.count, at += copy) {
            const Few<A, Wide> factors = load_row<Wide>(gate);
#pragma unroll
            for (int s = 0; s < Ahead; ++s) {
                if (left <= s * across.groups)
                    break;
                const Few<T, Wide> few = unpacked<T>(from[s]);
                Few<T, Wide> made;
#pragma unroll
                for (int e = 0; e < Wide; ++e)
                    made.at[e] = narrow<T>(widen(few.at[e]) * factors.at[e]);
                store<Wide>(at + s * to, made);
            }
        }
    }
}

// Gradients by `Side` gates are under way at a time: of all of them where they are two.
template <class T, int Side>
__device__ inline void backward_last(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int Wide = 16 / sizeof(T);
    M3EM_SHARED(memory);
    // For every gate and thread the sums of its channels over its positions, in rows as parted() has them.
    A *gates = reinterpret_cast<A *>(memory), *sums = gates + m.num_gates * m.chunk;
    const Part part(m.chunk, m.chunks, m.c);
    load_gates<T>(m, part, gates);
    const int p = m.h * m.w, rows = m.last * Wide, num_gates = Side > 1 ? Side : m.num_gates;
    const Across across(part.count / Wide, m.last);
    A *const own = sums + threadIdx.x * PartOf<A>;
    const A *const gate = gates + across.pack * Wide;
    if (across.walks)
#pragma unroll 1
        for (int i = 0; i < num_gates * rows; i += m.last * PartOf<A>)
            store<PartOf<A>>(own + i, Few<A, PartOf<A>>{});
    const auto place_of = [&](const Map &map, int q) {
        return part.n * map.stride[0] + q * step_of(map, m.w) + part.c0 + across.pack * Wide;
    };
#pragma unroll 1
    for (int q = across.walks ? across.group : p; q < p; q += across.groups) {
        const T *go = static_cast<const T *>(m.grad_out.data) + place_of(m.grad_out, q);
        Words x = {}, grads[Side];
        if (m.x.data)
            x = load_words(static_cast<const T *>(m.x.data) + place_of(m.x, q));
        A made[Wide] = {};
#pragma unroll 1
        for (int first = 0; first < num_gates; first += Side) {
#pragma unroll
            for (int s = 0; s < Side; ++s, go += m.c)
                grads[s] = load_words(go);
            const Few<T, Wide> xs = unpacked<T>(x);
#pragma unroll
            for (int s = 0; s < Side; ++s) {
                const int g = first + s;
                const Few<T, Wide> few = unpacked<T>(grads[s]);
                if (m.grad_x.data) {
                    const Few<A, Wide> factors = load_row<Wide>(gate + g * part.count);
#pragma unroll
                    for (int e = 0; e < Wide; ++e)
                        made[e] += widen(few.at[e]) * factors.at[e];
                }
                if (!m.grads[g].data)
                    continue;
#pragma unroll
                for (int e = 0; e < Wide; e += PartOf<A>) {
                    A *at = own + g * rows + e * m.last;
                    Few<A, PartOf<A>> sum = load<PartOf<A>>(at);
#pragma unroll
                    for (int i = 0; i < PartOf<A>; ++i)
                        sum.at[i] += widen(few.at[e + i]) * widen(xs.at[e + i]);
                    store<PartOf<A>>(at, sum);
                }
            }
        }
        if (!m.grad_x.data)
            continue;
        Few<T, Wide> few;
#pragma unroll
        for (int e = 0; e < Wide; ++e)
            few.at[e] = narrow<T>(made[e]);
        store<Wide>(static_cast<T *>(m.grad_x.data) + place_of(m.grad_x, q), few);
    }
    __syncthreads();
    // The groups of a channel in their order.
#pragma unroll 1
    for (int g = 0; g < m.num_gates; ++g) {
        if (!m.grads[g].data)
            continue;
        const A *all = sums + g * rows;
#pragma unroll 1
        for (int c = threadIdx.x; c < part.count; c += GateThreads) {
            A sum = 0;
#pragma unroll 1
            for (int thread = c / Wide; thread < across.groups * across.packs; thread += across.packs)
                sum += all[parted<A>(thread, c % Wide, m.last)];
            write_gate<T>(m, g, part.n, part.c0 + c, sum);
        }
    }
}

} // namespace
} // namespace m3em
