// channel_gate's kernels for the standalone program, against the definition in double.
#include "simt/standalone.h"

#include "cuda/channel_gate.cu"
#include "cuda/channel_gate.h"

namespace {

using namespace standalone;

struct Shape {
    const char *name;
    long long n, c, h, w;
    int gates;
    bool general; // the kernels for every shape, even where those for packs serve it
    Layout layout;
    bool only_last; // a gradient of one gate alone
};
// Packs of numbers of two channels and where there are none, walks of several steps and chunks, sums of a channel by
// several threads, tiles, segments of one channel, one position.
const Shape shapes[] = {
    {"7x7", 2, 24, 7, 7, 2, false, Layout::contiguous, false},
    {"7x7, several chunks", 1, 200, 7, 7, 2, false, Layout::contiguous, false},
    {"14x14", 1, 44, 14, 14, 5, false, Layout::contiguous, true},
    {"16x16, whole packs", 1, 3, 16, 16, 1, false, Layout::contiguous, false},
    {"7x7, kernels for every shape", 1, 40, 7, 7, 3, true, Layout::contiguous, true},
    {"7x7 channels_last", 1, 33, 7, 7, 2, false, Layout::channels_last, false},
    {"packs of channels_last", 1, 72, 7, 7, 2, false, Layout::channels_last, false},
    {"5x3", 1, 7, 5, 3, 1, false, Layout::contiguous, false},
    {"5x3 sliced", 1, 5, 5, 3, 2, false, Layout::sliced, false},
    {"7x151, parts of a channel", 1, 12, 7, 151, 4, false, Layout::contiguous, false},
    {"1x1", 1, 9, 1, 1, 2, false, Layout::contiguous, false},
};

template <class T>
m3em::Map map_of(Tensor<T> &t) {
    return {t.buffer.data(), {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}};
}

template <class T, void (*stage)(const m3em::ChannelGateArguments &)>
void enter(const void *given) {
    stage(*static_cast<const m3em::ChannelGateArguments *>(given));
}
template <class T>
constexpr void (*any[])(const void *) = {enter<T, m3em::forward<T>>, enter<T, m3em::backward<T>>};
template <class T>
constexpr void (*packs[])(const void *) = {enter<T, m3em::forward_packs<T>>, enter<T, m3em::backward_packs<T>>};

// `O` is the type of the result, of its gradient and of the gates.
template <class T, class O = T>
Finding run(const Shape &s, simt::Order order) {
    const long long all = s.c * s.gates, p = s.h * s.w;
    const Layout dense = s.layout == Layout::sliced ? Layout::contiguous : s.layout;
    Tensor<T> x(s.n, s.c, s.h, s.w, s.layout), grad_x(s.n, s.c, s.h, s.w, dense);
    Tensor<O> out(s.n, all, s.h, s.w, dense), grad_out(s.n, all, s.h, s.w, s.layout);
    // A gate and its gradient for every channel of the result; the gates beside each other.
    Tensor<O> gates(s.n, all, 1, 1, s.layout), grad_gates(s.n, all, 1, 1, Layout::contiguous);
    Draw draw;
    const auto fill = [&](auto &t) {
        for (long long n = 0; n < t.shape[0]; ++n)
            for (long long c = 0; c < t.shape[1]; ++c)
                for (long long y = 0; y < t.shape[2]; ++y)
                    for (long long x0 = 0; x0 < t.shape[3]; ++x0)
                        set(t.at(n, c, y, x0), draw());
    };
    fill(x), fill(gates), fill(grad_out);
    m3em::ChannelGateArguments m = {};
    m.x = map_of(x), m.out = map_of(out), m.grad_out = map_of(grad_out), m.grad_x = map_of(grad_x);
    m.n = int(s.n), m.c = int(s.c), m.h = int(s.h), m.w = int(s.w), m.num_gates = s.gates;
    m.wide = sizeof(O) != sizeof(T);
    m.rows = !m.wide && s.layout == Layout::contiguous, m.across = s.layout == Layout::channels_last;
    for (int g = 0; g < s.gates; ++g) {
        m.gates[g] = {&gates.at(0, g * s.c, 0, 0), {gates.stride[0], gates.stride[1]}, m.wide};
        if (!s.only_last || g == s.gates - 1)
            m.grads[g] = {&grad_gates.at(0, g * s.c, 0, 0), {grad_gates.stride[0], grad_gates.stride[1]}, m.wide};
    }
    const m3em::ChannelGatePlan plan(m, sizeof(T), !s.general && m3em::packed(m, sizeof(T)));
    const auto *const entries = m.active ? packs<T> : any<T>;
    const long long shared[] = {plan.forward_bytes, plan.backward_bytes};
    for (int stage = 0; stage < 2; ++stage)
        if (const char *error =
                simt::launch(entries[stage], &m, s.n * m.chunks, m3em::GateThreads, shared[stage], order))
            return error;
    // The definition, in the order N, C, H, W.
    const std::vector<double> of_x = numbers(x), of_gates = numbers(gates), of_grad = numbers(grad_out);
    std::vector<double> wanted(of_grad.size()), wanted_x(of_x.size()), wanted_gates(of_gates.size());
    for (long long n = 0; n < s.n; ++n)
        for (long long k = 0; k < all; ++k)
            for (long long q = 0; q < p; ++q) {
                const size_t gate = size_t(n * all + k), to = gate * p + q, from = size_t((n * s.c + k % s.c) * p + q);
                wanted[to] = of_x[from] * of_gates[gate];
                wanted_x[from] += of_grad[to] * of_gates[gate];
                wanted_gates[gate] += of_grad[to] * of_x[from];
            }
    std::vector<double> found_gates = numbers(grad_gates);
    for (long long n = 0; s.only_last && n < s.n; ++n)
        for (long long k = 0; k < all - s.c; ++k) {
            double &left = found_gates[size_t(n * all + k)];
            if (left == left)
                return "the gradient of a gate that wants none is written";
            left = wanted_gates[size_t(n * all + k)];
        }
    Finding finding = compare("result", numbers(out), wanted, 4 * unit<O>);
    if (finding.empty())
        finding = compare("gradient by x", numbers(grad_x), wanted_x, 4 * unit<T>);
    if (finding.empty())
        finding = compare("gradient by the gates", found_gates, wanted_gates, 64 * unit<O>);
    return finding;
}

void run_all(const Check &check) {
    for (const Shape &s : shapes) {
        check(std::string("float32 ") + s.name, [&](simt::Order order) { return run<float>(s, order); });
        check(std::string("float16 ") + s.name, [&](simt::Order order) { return run<__half>(s, order); });
    }
    check("float16 to float32", [](simt::Order order) { return run<__half, float>(shapes[6], order); });
}

const Op op = {"channel_gate", run_all};

} // namespace
