// consensus_pool on a card: one read of x; backward, one write of its gradient, and a read of x only where the map's
// gradient is wanted.
//
// A block takes a chunk of the channels of one sample. The form `packs` is for whole packs of 16 bytes, channel after
// channel: its threads walk over them in steps of whole channels, so that a thread has the same positions in every
// step. Their weights, and the sums of the map's gradient, stay in its registers, and shared memory gets one number, or
// two, for a pack. The form `any` is for everything else: channels that lie one after another go through shared memory
// number by number; in channels_last memory of whole packs neighbouring threads take neighbouring packs of channels
// (pool_last.cuh), in any other memory neighbouring channels. The map's gradient is a sum over all channels: a second
// kernel adds the chunks in their order. Every sum has one order, by C, H, W, dtype and form.
#include "cuda/pool_last.cuh"
#include "cuda/pool_packs.cuh"

namespace m3em {
namespace {

template <class T>
__device__ void forward(const ConsensusPoolArguments &m) {
    if constexpr (sizeof(T) < 8)
        if (m.last)
            return forward_last<T>(m);
    using A = typename acc_of<T>::type;
    M3EM_SHARED(memory);
    const int p = m.h * m.w, pitch = odd(m.segment), tid = threadIdx.x;
    const Part part(m.chunk, m.chunks, m.c);
    const T *x = sample_of<const T>(m.x, part.n, part.c0);
    const auto write_mean = [&](int c, A sum) {
        write<T, A>(m.out.data, part.n * m.out.stride[0] + (part.c0 + c) * m.out.stride[1], m.out.wide, sum / A(p));
    };
    if (!m.rows) {
#pragma unroll 1
        for (int c = tid; c < part.count; c += PoolThreads) {
            A sum = 0;
#pragma unroll 1
            for (int q = 0; q < p; ++q) {
                const int row = q / m.w, column = q - row * m.w;
                sum += A(widen(x[c * m.x.stride[1] + row * m.x.stride[2] + column * m.x.stride[3]])) *
                       weight_at<T, A>(m, part.n, q);
            }
            write_mean(c, sum);
        }
        return;
    }
    A *weights = reinterpret_cast<A *>(memory), *sums = weights + m.segment, *products = sums + m.tile;
    const int warp = tid / 32, lane = tid % 32;
#pragma unroll 1
    for (int first = 0; first < part.count; first += m.tile) {
        const int count = part.count - first < m.tile ? part.count - first : m.tile;
#pragma unroll 1
        for (int p0 = 0; p0 < p; p0 += m.segment) {
            const int positions = p - p0 < m.segment ? p - p0 : m.segment;
            if (positions < p || first == 0) {
                for (int q = tid; q < positions; q += PoolThreads)
                    weights[q] = weight_at<T, A>(m, part.n, p0 + q);
                __syncthreads();
            }
            const T *from = x + (long long)first * p + p0;
            for_slab<T, PoolThreads>(count * positions, positions, wide(from), [&](auto some, int i, Place place) {
                constexpr int E = decltype(some)::value;
                const Few<T, E> few = load<E>(from + i);
                A *to = products + place.c * pitch + place.q, *over = to + pitch - positions;
                const A *weight = weights + place.q, *again = weight - positions;
#pragma unroll
                for (int e = 0; e < E; ++e)
                    (e < place.left ? to : over)[e] = A(widen(few.at[e])) * (e < place.left ? weight : again)[e];
            });
            __syncthreads();
#pragma unroll 1
            for (int c = warp; c < count; c += PoolThreads / 32) {
                A sum = 0;
                for (int q = lane; q < positions; q += 32)
                    sum += products[c * pitch + q];
                sum = warp_sum(sum);
                if (lane == 0) {
                    sums[c] = p0 ? sums[c] + sum : sum;
                    if (p0 + positions == p)
                        write_mean(first + c, sums[c]);
                }
            }
            __syncthreads();
        }
    }
}

// Gradients of x, and products go * x of a tile of channels, or of a segment of one, whose memory lies together.
template <class T, class A>
__device__ void backward_tile(const ConsensusPoolArguments &m, const Part &part, int first, int count, int p, int p0,
                              int positions, const A *go, const A *weights, A *products, int pitch) {
    const T *from = m.x.data ? sample_of<const T>(m.x, part.n, part.c0) + (long long)first * p + p0 : nullptr;
    T *gx = m.grad_x.data ? sample_of<T>(m.grad_x, part.n, part.c0) + (long long)first * p + p0 : nullptr;
    for_slab<T, PoolThreads>(count * positions, positions, wide(from) && wide(gx), [&](auto some, int i, Place place) {
        constexpr int E = decltype(some)::value;
        const A one = go[first + place.c], next = place.left < E ? go[first + place.c + 1] : one;
        if (gx) {
            const A *weight = weights + place.q, *again = weight - positions;
            Few<T, E> made;
#pragma unroll
            for (int e = 0; e < E; ++e)
                made.at[e] = narrow<T>(e < place.left ? one * weight[e] : next * again[e]);
            store<E>(gx + i, made);
        }
        if (from) {
            const Few<T, E> few = load<E>(from + i);
            A *to = products + place.c * pitch + place.q, *over = to + pitch - positions;
#pragma unroll
            for (int e = 0; e < E; ++e)
                (e < place.left ? to : over)[e] = A(widen(few.at[e])) * (e < place.left ? one : next);
        }
    });
}

template <class T>
__device__ void backward(const ConsensusPoolArguments &m) {
    if constexpr (sizeof(T) < 8)
        if (m.last)
            return backward_last<T>(m);
    using A = typename acc_of<T>::type;
    M3EM_SHARED(memory);
    const int p = m.h * m.w, pitch = odd(m.segment), tid = threadIdx.x;
    const Part part(m.chunk, m.chunks, m.c);
    A *go = reinterpret_cast<A *>(memory), *weights = go + m.chunk, *sums = weights + m.segment;
    const int groups = PoolThreads / m.segment > 1 ? PoolThreads / m.segment : 1;
    A *products = sums + groups * m.segment;
    load_grad_out<T>(m, part, p, PoolThreads, go);
    A *partial = static_cast<A *>(m.partial) + (long long)blockIdx.x * p;
    if (!m.rows) {
        __syncthreads();
        // A warp takes a position, its lanes take channels.
        const int warp = tid / 32, lane = tid % 32;
#pragma unroll 1
        for (int q = warp; q < p; q += PoolThreads / 32) {
            const int row = q / m.w, column = q - row * m.w;
            const A weight = weight_at<T, A>(m, part.n, q);
            const long long *in = m.x.stride, *to = m.grad_x.stride;
            const T *x = m.x.data ? sample_of<const T>(m.x, part.n, part.c0) + row * in[2] + column * in[3] : nullptr;
            T *gx = m.grad_x.data ? sample_of<T>(m.grad_x, part.n, part.c0) + row * to[2] + column * to[3] : nullptr;
            A sum = 0;
#pragma unroll 1
            for (int c = lane; c < part.count; c += 32) {
                if (gx)
                    gx[c * to[1]] = narrow<T>(go[c] * weight);
                if (x)
                    sum += go[c] * A(widen(x[c * in[1]]));
            }
            if (!x)
                continue;
            sum = warp_sum(sum);
            if (lane == 0)
                partial[q] = sum;
        }
        return;
    }
    // Where there are more threads than positions, groups of threads share the channels of a tile.
    const int group = tid / m.segment, mine = tid - group * m.segment;
#pragma unroll 1
    for (int p0 = 0; p0 < p; p0 += m.segment) {
        const int positions = p - p0 < m.segment ? p - p0 : m.segment;
        __syncthreads();
        for (int q = tid; q < positions; q += PoolThreads)
            weights[q] = weight_at<T, A>(m, part.n, p0 + q);
        for (int i = tid; i < groups * m.segment; i += PoolThreads)
            sums[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < part.count; first += m.tile) {
            const int count = part.count - first < m.tile ? part.count - first : m.tile;
            backward_tile<T>(m, part, first, count, p, p0, positions, go, weights, products, pitch);
            if (!m.x.data)
                continue;
            __syncthreads();
            if (group < groups)
#pragma unroll 1
                for (int q = mine; q < positions; q += groups > 1 ? m.segment : PoolThreads) {
                    A sum = 0;
                    for (int c = group; c < count; c += groups)
                        sum += products[c * pitch + q];
                    sums[group * m.segment + q] += sum;
                }
            __syncthreads();
        }
        if (!m.x.data)
            continue;
        for (int q = tid; q < positions; q += PoolThreads) {
            A sum = sums[q];
            for (int i = 1; i < groups; ++i)
                sum += sums[i * m.segment + q];
            partial[p0 + q] = sum;
        }
    }
}

// The map's gradient: the chunks of a sample in their order.
template <class T>
__device__ void finish(const ConsensusPoolArguments &m) {
    using A = typename acc_of<T>::type;
    const long long p = (long long)m.h * m.w, i = blockIdx.x * (long long)PoolThreads + threadIdx.x;
    if (i >= m.n * p)
        return;
    const A *from = static_cast<const A *>(m.partial) + i + i / p * (m.chunks - 1) * p;
    A sum = from[0];
#pragma unroll 4
    for (int k = 1; k < m.chunks; ++k)
        sum += from[k * p];
    write<T, A>(m.grad_cmap.data, i, m.grad_cmap.wide, sum);
}

} // namespace
} // namespace m3em

#define M3EM_CONSENSUS_POOL_PACKS(dtype, T)                                                                            \
    M3EM_KERNEL(consensus_pool_forward_##dtype##_packs, m3em::PackThreads, m3em::PackBlocks,                           \
                m3em::ConsensusPoolArguments, m3em::forward_packs<T>)                                                  \
    M3EM_KERNEL(consensus_pool_backward_##dtype##_packs, m3em::PackThreads, m3em::PackBlocks,                          \
                m3em::ConsensusPoolArguments, m3em::backward_packs<T>)
#define M3EM_CONSENSUS_POOL(dtype, T)                                                                                  \
    M3EM_KERNEL(consensus_pool_forward_##dtype##_any, m3em::PoolThreads, m3em::PoolBlocks,                             \
                m3em::ConsensusPoolArguments, m3em::forward<T>)                                                        \
    M3EM_KERNEL(consensus_pool_backward_##dtype##_any, m3em::PoolThreads, m3em::PoolBlocks,                            \
                m3em::ConsensusPoolArguments, m3em::backward<T>)                                                       \
    M3EM_KERNEL(consensus_pool_finish_##dtype##_any, m3em::PoolThreads, 1, m3em::ConsensusPoolArguments,               \
                m3em::finish<T>)

M3EM_CONSENSUS_POOL_PACKS(f32, float)
M3EM_CONSENSUS_POOL_PACKS(f16, __half)
M3EM_CONSENSUS_POOL_PACKS(bf16, __nv_bfloat16)
M3EM_CONSENSUS_POOL(f64, double)
M3EM_CONSENSUS_POOL(f32, float)
M3EM_CONSENSUS_POOL(f16, __half)
M3EM_CONSENSUS_POOL(bf16, __nv_bfloat16)
