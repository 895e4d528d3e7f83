// consensus_pool's form `packs`, and what it shares with the form `any`.
#pragma once

#include "cuda/consensus_pool.cuh"
#include "cuda/slab.cuh"
#include "cuda/words.cuh"

namespace m3em {
namespace {

// 1 + cmap at a position.
template <class T, class A>
__device__ inline A weight_at(const ConsensusPoolArguments &m, long long n, int q) {
    if (!m.cmap.data)
        return A(1);
    const int row = q / m.w, column = q - row * m.w;
    const long long *s = m.cmap.stride;
    return A(1) + read<T, A>(m.cmap.data, n * s[0] + row * s[1] + column * s[2], m.cmap.wide);
}

// What each number of a channel gets of the gradient of its mean.
template <class T, class A>
__device__ inline void load_grad_out(const ConsensusPoolArguments &m, const Part &part, int p, int threads, A *go) {
#pragma unroll 1
    for (int c = threadIdx.x; c < part.count; c += threads)
        go[c] = read<T, A>(m.grad_out.data, part.n * m.grad_out.stride[0] + (part.c0 + c) * m.grad_out.stride[1],
                           m.grad_out.wide) /
                A(p);
}

// A thread that walks over the packs of a block, of which U are on their way.
template <class T, int U>
struct Walker {
    static constexpr int Wide = 16 / sizeof(T);
    const int walkers;   // packs from one of the thread's to the next
    const unsigned step; // bytes
    const Place place;   // where the thread's packs begin, with channels counted from the first of a step
    const int over;      // 1 where they end in the next channel
    int left;            // of the block's packs, from the thread's next one on
    const char *from;    // the one to be asked for next
    Words ahead[U];

    __device__ Walker(const ConsensusPoolArguments &m, int p, int count)
        : walkers(m.walkers), step(m.walkers * 16u), place(place_of(m, p)), over(place.left < Wide),
          left(int(threadIdx.x) < walkers ? int(unsigned(count * p) / Wide - threadIdx.x) : 0), from(nullptr) {}
    __device__ static Place place_of(const ConsensusPoolArguments &m, int p) {
        const int i = threadIdx.x * Wide, c = quotient(i, m.inverse), q = i - c * p;
        return {c, q, p - q};
    }
    __device__ void start(const T *x) {
        from = reinterpret_cast<const char *>(x) + threadIdx.x * 16u;
#pragma unroll
        for (int u = 0; u < U; ++u, from += step)
            if (left > u * walkers)
                ahead[u] = load_words(from);
    }

    // U steps. Whole: for every thread that walks there are as many packs, and as many again.
    template <bool Whole, bool Reads, class Body>
    __device__ void steps(const Body &body) {
        if (Whole && left <= 0)
            return;
#pragma unroll
        for (int u = 0; u < U; ++u, left -= walkers) {
            if (!Whole && left <= 0)
                break;
            body(unpacked<T>(ahead[u]));
            if (Reads && (Whole || left > U * walkers))
                ahead[u] = load_words(from);
            from += Reads ? step : 0;
        }
    }
    // The next U steps, which are of `channels` channels; `rest` are left in the block.
    template <bool Reads, class Body>
    __device__ void round(int channels, int rest, const Body &body) {
        if (rest >= 2 * channels)
            steps<true, Reads>(body);
        else
            steps<false, Reads>(body);
    }
};

// The weights of all positions, and of the first ones again: packs go over the end of a channel.
template <class T, class A>
__device__ inline void load_weights(const ConsensusPoolArguments &m, long long n, int p, A *weights) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p + int(16 / sizeof(T)) - 1; i += PackThreads)
        weights[i] = weight_at<T, A>(m, n, i < p ? i : i - p);
}

// The means of a tile's channels. The slots of a channel are added by neighbouring threads, m.share by each.
template <class T, class A>
__device__ inline void add_slots(const ConsensusPoolArguments &m, const Part &part, int tile, int count, int p,
                                 const A *slots) {
    constexpr unsigned W = 16 / sizeof(T);
    const long long to = part.n * m.out.stride[0] + (part.c0 + tile) * m.out.stride[1];
    const int lane = threadIdx.x & ((1u << m.spread) - 1);
#pragma unroll 1
    for (int item = threadIdx.x; item - int(threadIdx.x % 32) < count << m.spread; item += PackThreads) {
        const int c = item >> m.spread;
        const A *slot = slots + item * m.share;
        A sum = 0;
        if (c < count) {
            const int packs = int((unsigned(c * p) % W + p + W - 1) / W) - lane * m.share; // that hold its numbers
            int left = packs < m.share ? packs : m.share;
#pragma unroll 1
            for (; left >= 4; left -= 4, slot += 4)
                sum = sum + slot[0] + slot[1] + slot[2] + slot[3];
            if (left > 0)
                sum += slot[0];
            if (left > 1)
                sum += slot[1];
            if (left > 2)
                sum += slot[2];
        }
#pragma unroll 1
        for (int across = 1 << m.spread >> 1; across > 0; across >>= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, across);
        if (c < count && lane == 0)
            write<T, A>(m.out.data, to + c * m.out.stride[1], m.out.wide, sum / A(p));
    }
}

template <class T>
__device__ void forward_packs(const ConsensusPoolArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int W = 16 / sizeof(T), U = PacksAhead;
    M3EM_SHARED(memory);
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    A *weights = reinterpret_cast<A *>(memory), *slots = weights + p + W - 1;
    Walker<T, U> walker(m, p, part.count);
    walker.start(sample_of<const T>(m.x, part.n, part.c0));
    const Place place = walker.place;
    load_weights<T>(m, part.n, p, weights);
    __syncthreads();
    A weight[W];
#pragma unroll
    for (int e = 0; e < W; ++e)
        weight[e] = weights[place.q + e];
    // Each pack of a channel has one of its slots.
    const int pitch = m.share << m.spread, step = m.channels * pitch;
    const int own = place.c * pitch + int(threadIdx.x) - int(unsigned(place.c * p) / W);
    const int second = (place.c + 1) * pitch - own;
#pragma unroll 1
    for (int tile = 0; tile < part.count; tile += m.tile) {
        const int count = part.count - tile < m.tile ? part.count - tile : m.tile;
        int slot = own;
        const auto body = [&](const Few<T, W> &few) {
            A sum = 0, rest = 0;
#pragma unroll
            for (int e = 0; e < W; ++e) {
                const A x = widen(few.at[e]);
                if (e == 0 || e < place.left)
                    sum += x * weight[e];
                else
                    rest += x * weight[e];
            }
            slots[slot] = sum;
            if (walker.over)
                slots[slot + second] = rest;
            slot += step;
        };
#pragma unroll 1
        for (int c = 0; c < count; c += U * m.channels)
            walker.template round<true>(U * m.channels, part.count - tile - c, body);
        __syncthreads();
        add_slots<T>(m, part, tile, count, p, slots);
        if (tile + m.tile < part.count)
            __syncthreads();
    }
}

// The map's gradient: what the threads have summed for their positions, which is m.channels sums for every position.
template <class A, int W>
__device__ inline void add_threads(const ConsensusPoolArguments &m, int p, const A (&sums)[W], A *all) {
    const int tid = threadIdx.x;
    if (tid < m.walkers)
#pragma unroll
        for (int e = 0; e < W; ++e)
            all[tid * W + e] = sums[e];
    __syncthreads();
    const int group = quotient(tid, m.inverse);
    if (group < m.groups)
#pragma unroll 1
        for (int q = tid - group * p; q < p; q += PackThreads) {
            A sum = all[group * p + q];
#pragma unroll 4
            for (int c = group + m.groups; c < m.channels; c += m.groups)
                sum += all[c * p + q];
            all[group * p + q] = sum; // which this thread alone has read
        }
    __syncthreads();
    A *partial = static_cast<A *>(m.partial) + (long long)blockIdx.x * p;
#pragma unroll 1
    for (int q = tid; q < p; q += PackThreads) {
        A sum = all[q];
#pragma unroll 4
        for (int i = 1; i < m.groups; ++i)
            sum += all[i * p + q];
        partial[q] = sum;
    }
}

// Writes the gradient of x, or reads x for the map's, or both.
template <class T, bool Writes, bool Reads, int U>
__device__ inline void backward_packs_of(const ConsensusPoolArguments &m) {
    using A = typename acc_of<T>::type;
    constexpr int W = 16 / sizeof(T);
    M3EM_SHARED(memory);
    const int p = m.h * m.w;
    const Part part(m.chunk, m.chunks, m.c);
    A *weights = reinterpret_cast<A *>(memory), *go = weights + p + W - 1, *all = go + m.chunk;
    Walker<T, U> walker(m, p, part.count);
    if (Reads)
        walker.start(sample_of<const T>(m.x, part.n, part.c0));
    const Place place = walker.place;
    load_grad_out<T>(m, part, p, PackThreads, go);
    if (Writes)
        load_weights<T>(m, part.n, p, weights);
    __syncthreads();
    A weight[W], sums[W] = {};
#pragma unroll
    for (int e = 0; e < W; ++e)
        weight[e] = Writes ? weights[place.q + e] : A(0);
    const A *grad = go + place.c;
    char *to = Writes ? reinterpret_cast<char *>(sample_of<T>(m.grad_x, part.n, part.c0)) + threadIdx.x * 16u : nullptr;
    const auto body = [&](const Few<T, W> &few) {
        const A one = grad[0], other = grad[walker.over];
        Few<T, W> made;
#pragma unroll
        for (int e = 0; e < W; ++e) {
            const A each = e == 0 || e < place.left ? one : other;
            if (Writes)
                made.at[e] = narrow<T>(each * weight[e]);
            if (Reads)
                sums[e] += each * A(widen(few.at[e]));
        }
        if (Writes)
            *reinterpret_cast<Few<T, W> *>(to) = made;
        grad += m.channels, to += Writes ? walker.step : 0;
    };
#pragma unroll 1
    for (int c = 0; c < part.count; c += U * m.channels)
        walker.template round<Reads>(U * m.channels, part.count - c, body);
    if (Reads)
        add_threads(m, p, sums, all);
}

template <class T>
__device__ void backward_packs(const ConsensusPoolArguments &m) {
    if (!m.x.data)
        backward_packs_of<T, true, false, 2>(m);
    else if (m.grad_x.data)
        backward_packs_of<T, true, true, 2>(m);
    else
        backward_packs_of<T, false, true, 3>(m);
}

} // namespace
} // namespace m3em
