// consensus_pool's kernels for the standalone program, against the definition in double.
#include "simt/standalone.h"

#include "cuda/consensus_pool.cu"
#include "cuda/consensus_pool.h"

namespace {

using namespace standalone;

struct Shape {
    const char *name;
    long long n, c, h, w;
    bool map, general; // with a map; the form `any`, even where `packs` would serve
    Layout layout;
    bool only_map; // no gradient of x
};
// Packs of numbers of two channels and what is left of them, rounds of steps and parts of one, tiles, chunks, segments
// of one channel, one position.
const Shape shapes[] = {
    {"7x7", 2, 24, 7, 7, true, false, Layout::contiguous, false},
    {"7x7, two chunks", 1, 360, 7, 7, true, false, Layout::contiguous, false},
    {"7x7, two chunks, any", 1, 360, 7, 7, true, true, Layout::contiguous, true},
    {"7x7 without a map", 1, 4, 7, 7, false, false, Layout::contiguous, false},
    {"7x7 channels_last", 1, 34, 7, 7, true, false, Layout::channels_last, false},
    {"packs of channels_last", 1, 360, 7, 7, true, false, Layout::channels_last, false},
    {"16x16, tiles", 1, 72, 16, 16, true, false, Layout::contiguous, true},
    {"3x3 without a map", 2, 16, 3, 3, false, false, Layout::contiguous, false},
    {"5x3", 1, 6, 5, 3, true, false, Layout::contiguous, false},
    {"5x3 sliced", 1, 5, 5, 3, true, false, Layout::sliced, false},
    {"59x73, parts of a channel", 1, 2, 59, 73, true, false, Layout::contiguous, false},
    {"1x1", 1, 9, 1, 1, true, false, Layout::contiguous, false},
};

template <class T>
m3em::Map map_of(Tensor<T> &t) {
    return {t.buffer.data(), {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}};
}

template <class T, void (*stage)(const m3em::ConsensusPoolArguments &)>
void enter(const void *given) {
    stage(*static_cast<const m3em::ConsensusPoolArguments *>(given));
}
template <class T>
constexpr void (*any[])(const void *) = {enter<T, m3em::forward<T>>, enter<T, m3em::backward<T>>,
                                         enter<T, m3em::finish<T>>};
template <class T>
constexpr void (*packs[])(const void *) = {enter<T, m3em::forward_packs<T>>, enter<T, m3em::backward_packs<T>>,
                                           enter<T, m3em::finish<T>>};

// `O` is the type of the map, of the result and of their gradients.
template <class T, class O = T>
Finding run(const Shape &s, simt::Order order) {
    const long long p = s.h * s.w;
    const Layout dense = s.layout == Layout::sliced ? Layout::contiguous : s.layout;
    Tensor<T> x(s.n, s.c, s.h, s.w, s.layout), grad_x(s.n, s.c, s.h, s.w, dense);
    Tensor<O> cmap(s.n, 1, s.h, s.w, s.layout), grad_cmap(s.n, 1, s.h, s.w, Layout::contiguous);
    Tensor<O> out(s.n, s.c, 1, 1, Layout::contiguous), grad_out(s.n, s.c, 1, 1, s.layout);
    Draw draw;
    const auto fill = [&](auto &t) {
        for (long long n = 0; n < t.shape[0]; ++n)
            for (long long c = 0; c < t.shape[1]; ++c)
                for (long long y = 0; y < t.shape[2]; ++y)
                    for (long long x0 = 0; x0 < t.shape[3]; ++x0)
                        set(t.at(n, c, y, x0), draw());
    };
    fill(x), fill(cmap), fill(grad_out);
    const int wide = sizeof(O) != sizeof(T);
    const auto matrix = [&](auto &t) { return m3em::Beside{t.buffer.data(), {t.stride[0], t.stride[1], 0}, wide}; };
    const auto plane = [&](auto &t) {
        return m3em::Beside{t.buffer.data(), {t.stride[0], t.stride[2], t.stride[3]}, wide};
    };
    m3em::ConsensusPoolArguments m = {};
    m.x = map_of(x), m.out = matrix(out), m.grad_out = matrix(grad_out);
    if (s.map)
        m.cmap = plane(cmap), m.grad_cmap = plane(grad_cmap);
    if (!s.only_map)
        m.grad_x = map_of(grad_x);
    m.n = int(s.n), m.c = int(s.c), m.h = int(s.h), m.w = int(s.w);
    m.rows = s.layout == Layout::contiguous;
    const m3em::ConsensusPoolPlan plan(m, sizeof(T), !s.general && m3em::packed(m, sizeof(T)));
    Buffer<float> partial(size_t(s.n * plan.workspace));
    m.partial = partial.data();
    const auto *const entries = m.walkers ? packs<T> : any<T>;
    const int threads = m.walkers ? m3em::PackThreads : m3em::PoolThreads;
    const long long chunks = s.n * m.chunks, blocks[] = {chunks, chunks, (s.n * p - 1) / m3em::PoolThreads + 1};
    const long long shared[] = {plan.forward_bytes, plan.backward_bytes, 0};
    for (int stage = 0; stage < (s.map ? 3 : 2); ++stage) {
        if (stage == 1 && !s.map)
            m.x.data = nullptr; // x is read for the map's gradient alone
        if (const char *error = simt::launch(entries[stage], &m, blocks[stage], stage < 2 ? threads : m3em::PoolThreads,
                                             shared[stage], order))
            return error;
    }
    // The definition, in the order N, C, H, W.
    const std::vector<double> of_x = numbers(x), of_map = numbers(cmap), of_grad = numbers(grad_out);
    std::vector<double> wanted(of_grad.size()), wanted_x(of_x.size()), wanted_map(of_map.size());
    for (long long n = 0; n < s.n; ++n)
        for (long long c = 0; c < s.c; ++c)
            for (long long q = 0; q < p; ++q) {
                const size_t channel = size_t(n * s.c + c), at = channel * p + q, place = size_t(n * p + q);
                const double weight = s.map ? 1 + of_map[place] : 1;
                wanted[channel] += of_x[at] * weight / p;
                wanted_x[at] = of_grad[channel] * weight / p;
                wanted_map[place] += of_grad[channel] * of_x[at] / p;
            }
    Finding finding = compare("result", numbers(out), wanted, 64 * unit<O>);
    if (finding.empty() && !s.only_map)
        finding = compare("gradient by x", numbers(grad_x), wanted_x, 4 * unit<T>);
    if (finding.empty() && s.map)
        finding = compare("gradient by the map", numbers(grad_cmap), wanted_map, 64 * unit<O>);
    return finding;
}

void run_all(const Check &check) {
    for (const Shape &s : shapes) {
        check(std::string("float32 ") + s.name, [&](simt::Order order) { return run<float>(s, order); });
        check(std::string("float16 ") + s.name, [&](simt::Order order) { return run<__half>(s, order); });
    }
    check("float16 to float32", [](simt::Order order) { return run<__half, float>(shapes[0], order); });
}

const Op op = {"consensus_pool", run_all};

} // namespace
