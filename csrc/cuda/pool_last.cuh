// consensus_pool's form `any` for channels_last memory of whole packs.
#pragma once

#include "cuda/last_packs.cuh"
#include "cuda/pool_packs.cuh"

namespace m3em {
namespace {

// body(first position, positions) for all segments of a sample, whose weights are then there.
template <class T, class A, class Body>
__device__ inline void each_segment(const ConsensusPoolArguments &m, long long n, A *weights, const Body &body) {
    const int p = m.h * m.w;
#pragma unroll 1
    for (int first = 0; first < p; first += m.segment) {
        const int count = p - first < m.segment ? p - first : m.segment;
        if (first)
            __syncthreads();
#pragma unroll 1
        for (int q = threadIdx.x; q < count; q += PoolThreads)
            weights[q] = weight_at<T, A>(m, n, first + q);
        __syncthreads();
        body(first, count);
    }
}

// A thread has a pack of channels, and of their positions every so many; four of them are under way at a time.
template <class T>
__device__ inline void forward_last(const ConsensusPoolArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int Wide = 16 / sizeof(T), Ahead = 4;
    M3EM_SHARED(memory);
    A *all = reinterpret_cast<A *>(memory), *weights = all + PoolThreads * Wide;
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    const Across across(part.count / Wide, PoolThreads);
    const long long next = step_of(m.x, m.w), step = across.groups * next;
    const T *x = sample_of<const T>(m.x, part.n, part.c0) + across.pack * Wide;
    A sums[Wide] = {};
    each_segment<T>(m, part.n, weights, [&](int first, int count) {
        const T *from = x + (first + across.group) * next;
        const A *weight = weights + across.group;
        int left = across.walks ? count - across.group : 0; // positions from the thread's next one on
#pragma unroll 1
        for (; left > 0; left -= Ahead * across.groups, from += Ahead * step, weight += Ahead * across.groups) {
            Words ahead[Ahead];
#pragma unroll
            for (int s = 0; s < Ahead; ++s)
                if (left > s * across.groups)
                    ahead[s] = load_words(from + s * step);
#pragma unroll
            for (int s = 0; s < Ahead; ++s) {
                if (left <= s * across.groups)
                    break;
                const Few<T, Wide> few = unpacked<T>(ahead[s]);
                const A one = weight[s * across.groups];
#pragma unroll
                for (int e = 0; e < Wide; ++e)
                    sums[e] += A(widen(few.at[e])) * one;
            }
        }
    });
    if (across.walks)
#pragma unroll
        for (int e = 0; e < Wide; e += 4)
            store<4>(all + threadIdx.x * Wide + e, Few<A, 4>{sums[e], sums[e + 1], sums[e + 2], sums[e + 3]});
    __syncthreads();
    // The groups of a channel in their order.
#pragma unroll 1
    for (int c = threadIdx.x; c < part.count; c += PoolThreads) {
        A sum = all[c];
#pragma unroll 4
        for (int i = 1; i < across.groups; ++i)
            sum += all[i * part.count + c];
        write<T, A>(m.out.data, part.n * m.out.stride[0] + (part.c0 + c) * m.out.stride[1], m.out.wide, sum / A(p));
    }
}

// A warp has four positions at a time, its lanes have packs of channels.
template <class T>
__device__ inline void backward_last(const ConsensusPoolArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int Wide = 16 / sizeof(T), Ahead = 4, Warps = PoolThreads / 32;
    M3EM_SHARED(memory);
    A *go = reinterpret_cast<A *>(memory), *weights = go + m.chunk;
    const int p = m.h * m.w, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Part part(m.chunk, m.chunks, m.c);
    const int packs = part.count / Wide;
    const long long in = step_of(m.x, m.w), to = step_of(m.grad_x, m.w);
    const T *x = m.x.data ? sample_of<const T>(m.x, part.n, part.c0) : nullptr;
    T *gx = m.grad_x.data ? sample_of<T>(m.grad_x, part.n, part.c0) : nullptr;
    A *partial = static_cast<A *>(m.partial) + (long long)blockIdx.x * p;
    load_grad_out<T>(m, part, p, PoolThreads, go);
    each_segment<T>(m, part.n, weights, [&](int first, int count) {
#pragma unroll 1
        for (int q = warp; q < count; q += Ahead * Warps) {
            A sums[Ahead] = {};
#pragma unroll 1
            for (int k = lane; k < packs; k += 32) {
                Words ahead[Ahead] = {};
                if (x)
#pragma unroll
                    for (int s = 0; s < Ahead; ++s)
                        if (q + s * Warps < count)
                            ahead[s] = load_words(x + (first + q + s * Warps) * in + k * Wide);
                const Few<A, Wide> grads = load_row<Wide>(go + k * Wide);
#pragma unroll
                for (int s = 0; s < Ahead; ++s) {
                    if (q + s * Warps >= count)
                        break;
                    if (x) {
                        const Few<T, Wide> few = unpacked<T>(ahead[s]);
#pragma unroll
                        for (int e = 0; e < Wide; ++e)
                            sums[s] += grads.at[e] * A(widen(few.at[e]));
                    }
                    if (!gx)
                        continue;
                    const A weight = weights[q + s * Warps];
                    Few<T, Wide> made;
#pragma unroll
                    for (int e = 0; e < Wide; ++e)
                        made.at[e] = narrow<T>(grads.at[e] * weight);
                    store<Wide>(gx + (first + q + s * Warps) * to + k * Wide, made);
                }
            }
            if (!x)
                continue;
#pragma unroll
            for (int s = 0; s < Ahead; ++s) {
                const A sum = warp_sum(sums[s]);
                if (lane == 0 && q + s * Warps < count)
                    partial[first + q + s * Warps] = sum;
            }
        }
    });
}

} // namespace
} // namespace m3em
