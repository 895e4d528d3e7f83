// channel_gate's form `packs`, and what it shares with the form `any`.
//
// Where channels lie one after another in whole packs of 16 bytes, a thread meets the same positions in every step of
// its walk (see Walk). What a pack holds of its channel, and what of the next one, is added up in registers, and the
// sums of the packs of a channel meet in shared memory.
#pragma once

#include "cuda/channel_gate.cuh"
#include "cuda/slab.cuh"
#include "cuda/words.cuh"

namespace m3em {
namespace {

// A number of a gate on its way: converted where it is used, or a thread would wait before it asks for the next one.
template <class T, class A>
struct GateAt {
    A accumulated = 0;
    T own{};
    __device__ GateAt(const Gate &gate, long long n, int c) {
        const long long at = n * gate.stride[0] + c * gate.stride[1];
        if (gate.data && gate.wide)
            accumulated = static_cast<const A *>(gate.data)[at];
        else if (gate.data)
            own = static_cast<const T *>(gate.data)[at];
    }
    __device__ A value(const Gate &gate) const { return gate.wide ? accumulated : A(widen(own)); }
};

// The gates of the block's channels, [gate][channel]; 0 for one that is not needed.
template <class T, class A>
__device__ void load_gates(const ChannelGateArguments &m, const Part &part, A *gates) {
#pragma unroll 1
    for (int g = 0; g < m.num_gates; g += 2) {
        const int other = g + 1 < m.num_gates ? g + 1 : g;
#pragma unroll 1
        for (int c = threadIdx.x; c < part.count; c += GateThreads) {
            const GateAt<T, A> first(m.gates[g], part.n, part.c0 + c), second(m.gates[other], part.n, part.c0 + c);
            gates[g * part.count + c] = first.value(m.gates[g]);
            gates[other * part.count + c] = second.value(m.gates[other]);
        }
    }
    __syncthreads();
}

template <class T, class A>
__device__ inline void write_gate(const ChannelGateArguments &m, int g, long long n, int c, A value) {
    const Gate &grad = m.grads[g];
    write<T, A>(grad.data, n * grad.stride[0] + c * grad.stride[1], grad.wide, value);
}

// The first number of a chunk where channels lie one after another.
template <class T>
__device__ inline T *slab_of(const Map &map, const Part &part, int positions) {
    return static_cast<T *>(map.data) + part.n * map.stride[0] + (long long)part.c0 * positions;
}

// Four packs of x are on their way at any time, and before the gates are read.
template <class T>
__device__ void forward_packs(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int Wide = 16 / sizeof(T), Ahead = 4;
    M3EM_SHARED(memory);
    A *gates = reinterpret_cast<A *>(memory);
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    const Walk<T> walk(m.active, p);
    const int packs = part.count * p / Wide, left = walk.place.left, next = left < Wide;
    const T *x = slab_of<const T>(m.x, part, p);
    T *out = slab_of<T>(m.out, part, p);
    const long long copy = (long long)m.c * p; // from one gated copy to the next
    int k = int(threadIdx.x) < m.active ? threadIdx.x : packs, c = walk.place.c;
    Words from[Ahead];
    const auto fetch = [&](Words &to, int k) {
        if (k < packs)
            to = load_words(x + k * Wide);
    };
#pragma unroll
    for (int s = 0; s < Ahead; ++s)
        fetch(from[s], k + s * m.active);
    load_gates<T>(m, part, gates);
#pragma unroll 1
    while (k < packs) {
#pragma unroll
        for (int s = 0; s < Ahead; ++s, k += m.active, c += m.channels) {
            if (k >= packs)
                break;
            const Few<T, Wide> few = unpacked<T>(from[s]);
            const A *gate = gates + c;
            T *to = out + k * Wide;
#pragma unroll 1
            for (int g = 0; g < m.num_gates; ++g, gate += part.count, to += copy) {
                const A first = gate[0], second = gate[next];
                Few<T, Wide> made;
#pragma unroll
                for (int e = 0; e < Wide; ++e)
                    made.at[e] = narrow<T>(widen(few.at[e]) * (e == 0 || e < left ? first : second));
                store<Wide>(to, made);
            }
            fetch(from[s], k + Ahead * m.active);
        }
    }
}

// The walk over a chunk: the gradient of x, and the sums of packs for those of the gates. What the next step needs is
// on its way while a pack is worked on. `Gates` is the number of gates, or 0 for any number, one after another; without
// `ForX` no gradient of x is wanted, and the gates are not read.
template <class T, int Gates, bool ForX, class A>
__device__ void backward_walk(const ChannelGateArguments &m, const Part &part, A *gates, A *sums) {
    constexpr int Wide = 16 / sizeof(T), Side = Gates ? Gates : 1;
    const int p = m.h * m.w, packs = part.count * p / Wide, num_gates = Gates ? Gates : m.num_gates;
    const Walk<T> walk(m.active, p);
    const int left = walk.place.left, next = left < Wide;
    const long long copy = (long long)m.c * p;
    const T *x = m.x.data ? slab_of<const T>(m.x, part, p) : nullptr, *go = slab_of<const T>(m.grad_out, part, p);
    T *gx = ForX && m.grad_x.data ? slab_of<T>(m.grad_x, part, p) : nullptr;
    struct Pack {
        Words x, grads[Side];
    } now = {};
    const auto fetch = [&](Words &to, int k, int g) {
        if (k < packs)
            to = load_words(go + k * Wide + g * copy);
    };
    const auto fetch_all = [&](Pack &to, int k) {
        if (m.x.data && k < packs)
            to.x = load_words(x + k * Wide);
#pragma unroll
        for (int g = 0; g < Side; ++g)
            fetch(to.grads[g], k, g);
    };
    int k = int(threadIdx.x) < m.active ? threadIdx.x : packs, c = walk.place.c;
    fetch_all(now, k);
    if (ForX)
        load_gates<T>(m, part, gates);
#pragma unroll 1
    for (; k < packs; k += m.active, c += m.channels) {
        Pack then = {};
        if (Gates)
            fetch_all(then, k + m.active);
        const Few<T, Wide> xs = unpacked<T>(now.x);
        A made[Wide] = {};
#pragma unroll Side
        for (int g = 0; g < num_gates; ++g) {
            if (!Gates && g + 1 < num_gates)
                fetch(then.grads[0], k, g + 1);
            else if (!Gates)
                fetch_all(then, k + m.active);
            const Few<T, Wide> grads = unpacked<T>(now.grads[g % Side]);
            const A *gate = gates + g * part.count + c;
            const A one = ForX ? gate[0] : A(0), other = ForX ? gate[next] : A(0);
            A first = 0, second = 0;
#pragma unroll
            for (int e = 0; e < Wide; ++e) {
                const bool before = e == 0 || e < left;
                const A value = widen(grads.at[e]);
                made[e] += value * (before ? one : other);
                // Not the other one times 0: it may be infinite.
                if (before)
                    first += value * widen(xs.at[e]);
                else
                    second += value * widen(xs.at[e]);
            }
            A *firsts = sums + g * (m.packs + m.chunk), *seconds = firsts + m.packs;
            firsts[k] = first;
            if (next)
                seconds[c + 1] = second;
            if (!Gates)
                now.grads[0] = then.grads[0];
        }
        now = then;
        if (!ForX || !m.grad_x.data)
            continue;
        Few<T, Wide> few;
#pragma unroll
        for (int e = 0; e < Wide; ++e)
            few.at[e] = narrow<T>(made[e]);
        store<Wide>(gx + k * Wide, few);
    }
}

// The gradients of a gate, from the sums of packs: for each channel those of the packs that begin in it, `firsts`, and
// of what it has of a pack that begins in the channel before, `seconds`.
template <class T, class A>
__device__ void add_packs(const ChannelGateArguments &m, const Part &part, int g, const A *firsts) {
    constexpr int Wide = 16 / sizeof(T);
    const A *seconds = firsts + m.packs;
    const int p = m.h * m.w, lanes = 1 << m.halves, lane = threadIdx.x & (lanes - 1), all = part.count * lanes;
#pragma unroll 1
    for (int i = threadIdx.x; i - int(threadIdx.x % 32) < all; i += GateThreads) {
        const int c = i >> m.halves, begin = c * p;
        const bool mine = c < part.count;
        A sum = mine && lane == 0 && begin % Wide != 0 ? seconds[c] : A(0);
        if (mine)
#pragma unroll 4
            for (int k = (begin + Wide - 1) / Wide + lane; k <= (begin + p - 1) / Wide; k += lanes)
                sum += firsts[k];
#pragma unroll 1
        for (int step = lanes / 2; step > 0; step /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (mine && lane == 0)
            write_gate<T>(m, g, part.n, part.c0 + c, sum);
    }
}

template <class T>
__device__ void backward_packs(const ChannelGateArguments &m) {
    using A = typename acc_of<T>::type;
    M3EM_SHARED(memory);
    const Part part(m.chunk, m.chunks, m.c);
    A *gates = reinterpret_cast<A *>(memory), *sums = gates + m.num_gates * m.chunk;
    if (m.num_gates == 2 && m.grad_x.data)
        backward_walk<T, 2, true>(m, part, gates, sums);
    else if (m.num_gates == 2)
        backward_walk<T, 2, false>(m, part, gates, sums);
    else
        backward_walk<T, 0, true>(m, part, gates, sums);
    __syncthreads();
    for (int g = 0; g < m.num_gates; ++g)
        if (m.grads[g].data)
            add_packs<T>(m, part, g, sums + g * (m.packs + m.chunk));
}

} // namespace
} // namespace m3em
