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

// `O` is the type of the gated copies.
template <class T, class O, class A>
__device__ void forward_lines(const ChannelGateArguments &m, const Part &part, const A *gates) {
    OnLines on(m);
    const T *const x = sample_of<const T>(m.x, part.n, part.c0);
    O *const out = sample_of<O>(m.out, part.n, part.c0);
    const long long stride = m.x.stride[1], pitch = m.out.stride[1];
    on.each<4>(part.count, [&](auto lines, int c) {
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
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g, gate += part.count) {
            O *to = out + ((long long)g * m.c + c) * pitch + on.place;
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
    const long long stride = m.x.stride[1], pitch = m.grad_out.stride[1];
    const bool leads = (threadIdx.x & (on.lanes - 1)) == 0;
    on.each<4>(part.count, [&](auto lines, int c) {
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
#pragma unroll 1
        for (int g = 0; g < m.num_gates; ++g) {
            const G *line = grads + ((long long)g * m.c + known) * pitch + on.place;
            G arriving[Lines][2];
#pragma unroll
            for (int u = 0; u < Lines; ++u, line += on.step * pitch)
                arriving[u][0] = line[0], arriving[u][1] = line[on.next];
            A sum[Lines];
#pragma unroll
            for (int u = 0; u < Lines; ++u) {
                const A factor = gates[g * part.count + known + u * on.step];
                const A one = widen(arriving[u][0]), other = widen(arriving[u][1]);
                made[u][0] += one * factor, made[u][1] += other * factor;
                sum[u] = (on.first ? one * widen(from[u][0]) : A(0)) + (on.second ? other * widen(from[u][1]) : A(0));
            }
            if (!m.grads[g].data)
                continue;
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2)
                if (apart < on.lanes)
#pragma unroll
                    for (int u = 0; u < Lines; ++u)
                        sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], apart);
            if (leads && there)
#pragma unroll
                for (int u = 0; u < Lines; ++u) {
                    A &all = sums[g * m.chunk + c + u * on.step]; // this thread's own
                    all = on.start ? all + sum[u] : sum[u];
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
