// channel_gate's form `any` where all maps hold the positions of a channel one after another, wherever channels and
// samples begin: lines. As many lanes as a line needs, a warp's at most, take a line, two positions each at a time, and
// several lines are on their way at once. A lane behind the end of a line reads its last number, which nobody uses: a
// number that is loaded under a condition is waited for at once (see Words).
#pragma once

#include "cuda/gate_packs.cuh"

namespace m3em {
namespace {

// A thread's place on its way over the lines of a block, which are `step` channels apart.
struct OnLines {
    int positions, lanes, step, start, place, next; // `next`: from the first of two numbers to the second
    bool first, second;                             // whether they are there
    __device__ explicit OnLines(const ChannelGateArguments &m)
        : positions(m.h * m.w), lanes(m.lanes), step(GateThreads / m.lanes) {}
    // body(Count<lines>, channel) for all channels and stretches of positions.
    template <int Lines, class Body>
    __device__ void each(int count, const Body &body) {
        const int line = int(threadIdx.x) / lanes, lane = int(threadIdx.x) & (lanes - 1), last = positions - 1;
#pragma unroll 1
        for (start = 0; start < positions; start += 2 * lanes) {
            const int q = start + lane, other = q + lanes;
            first = q <= last, second = other <= last;
            place = first ? q : last, next = (second ? other : last) - place;
            int c = line;
#pragma unroll 1
            for (; c - line + Lines * step <= count; c += Lines * step)
                body(Count<Lines>{}, c);
#pragma unroll 1
            for (; c - line < count; c += step)
                body(Count<1>{}, c);
        }
    }
};

// Lines that are on their way together, as far as there are registers.
__device__ constexpr int at_once(int element) { return element == 8 ? 1 : 4; }

// The sums over the lanes of lines, which are 4 at least: that of line u to the lane u. All of a warp call it.
template <int Lines, class A>
__device__ inline A sum_of_lines(const A *sums, int lanes) {
    const auto other = [](A x, int apart) { return __shfl_xor_sync(0xffffffffu, x, apart); };
    A sum = sums[0];
    if (Lines == 4) { // each lane goes on with one line of two, then of the two that are left
        const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
        const A low = (odd ? sums[1] : sums[0]) + other(odd ? sums[0] : sums[1], 1);
        const A up = (odd ? sums[Lines - 1] : sums[Lines / 2]) + other(odd ? sums[Lines / 2] : sums[Lines - 1], 1);
        sum = (high ? up : low) + other(high ? low : up, 2);
    } else {
        sum += other(sum, 1);
        sum += other(sum, 2);
    }
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2)
        if (apart < lanes)
            sum += other(sum, apart);
    return sum;
}

// `O` is the type of the gated copies.
template <class T, class O, class A>
__device__ void forward_lines(const ChannelGateArguments &m, const Part &part, const A *gates) {
    OnLines on(m);
    const T *const x = sample_of<const T>(m.x, part.n, part.c0);
    O *const out = sample_of<O>(m.out, part.n, part.c0);
    const long long stride = m.x.stride[1], pitch = m.out.stride[1], copy = m.c * pitch;
    on.each<at_once(sizeof(T))>(part.count, [&](auto lines, int c) {
        constexpr int Lines = decltype(lines)::value;
        const bool there = Lines > 1 || c < part.count;
        const T *line = x + (there ? c : 0) * stride + on.place;
        T from[Lines][2];
#pragma unroll
        for (int u = 0; u < Lines; ++u, line += on.step * stride)
            from[u][0] = line[0], from[u][1] = line[on.next];
        if (!there)
            return;
        const A *gate = gates + c;
        O *begin = out + c * pitch + on.place;
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g, gate += part.count, begin += copy) {
            O *to = begin;
#pragma unroll
            for (int u = 0; u < Lines; ++u, to += on.step * pitch) {
                const A factor = gate[u * on.step];
                if (on.first)
                    to[0] = narrow<O>(widen(from[u][0]) * factor);
                if (on.second)
                    to[on.next] = narrow<O>(widen(from[u][1]) * factor);
            }
        }
    });
}

// `G` is the type of the gradient of the gated copies; `sums` is room for those of the gates, [gate][channel].
template <class T, class G, class A>
__device__ void backward_lines(const ChannelGateArguments &m, const Part &part, const A *gates, A *sums) {
    OnLines on(m);
    const T *const x = m.x.data ? sample_of<const T>(m.x, part.n, part.c0) : nullptr;
    const G *const grads = sample_of<const G>(m.grad_out, part.n, part.c0);
    T *const grad_x = m.grad_x.data ? sample_of<T>(m.grad_x, part.n, part.c0) : nullptr;
    const long long stride = m.x.stride[1], pitch = m.grad_out.stride[1], copy = m.c * pitch;
    const int lane = threadIdx.x & (on.lanes - 1);
    on.each<at_once(sizeof(T))>(part.count, [&](auto lines, int c) {
        constexpr int Lines = decltype(lines)::value;
        const bool there = Lines > 1 || c < part.count; // lanes of a warp go on together
        const int known = there ? c : 0;
        T from[Lines][2] = {};
        if (x) {
            const T *line = x + known * stride + on.place;
#pragma unroll
            for (int u = 0; u < Lines; ++u, line += on.step * stride)
                from[u][0] = line[0], from[u][1] = line[on.next];
        }
        A made[Lines][2] = {};
        const G *begin = grads + known * pitch + on.place;
        const A *gate = gates + known;
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g, begin += copy, gate += part.count) {
            const G *line = begin;
            G arriving[Lines][2];
#pragma unroll
            for (int u = 0; u < Lines; ++u, line += on.step * pitch)
                arriving[u][0] = line[0], arriving[u][1] = line[on.next];
            A each[Lines];
#pragma unroll
            for (int u = 0; u < Lines; ++u) {
                const A factor = gate[u * on.step], first = widen(arriving[u][0]), second = widen(arriving[u][1]);
                made[u][0] += first * factor, made[u][1] += second * factor;
                const A one = first * widen(from[u][0]), other = second * widen(from[u][1]);
                each[u] = (on.first ? one : A(0)) + (on.second ? other : A(0));
            }
            if (!m.grads[g].data)
                continue;
            const A sum = sum_of_lines<Lines>(each, on.lanes);
            if (lane < Lines && there) {
                A &all = sums[g * m.chunk + c + lane * on.step]; // this thread's own
                all = on.start ? all + sum : sum;
            }
        }
        if (!grad_x || !there)
            return;
        T *to = grad_x + c * m.grad_x.stride[1] + on.place;
#pragma unroll
        for (int u = 0; u < Lines; ++u, to += on.step * m.grad_x.stride[1]) {
            if (on.first)
                to[0] = narrow<T>(made[u][0]);
            if (on.second)
                to[on.next] = narrow<T>(made[u][1]);
        }
    });
    __syncthreads();
#pragma unroll 1
    for (int g = 0; g < m.num_gates; ++g)
        if (m.grads[g].data)
            for (int c = threadIdx.x; c < part.count; c += GateThreads)
                write_gate<T>(m, g, part.n, part.c0 + c, sums[g * m.chunk + c]);
}

} // namespace
} // namespace m3em
