// consensus_map's kernels for the standalone program, against the definition in double.
#include "simt/standalone.h"

#include "cuda/consensus_map.cu"
#include "cuda/consensus_map.h"

namespace {

using namespace standalone;

struct Shape {
    const char *name;
    long long n, d, h, w;
    int scales;
    bool center;
    Layout layout;
    bool only_a; // a gradient of one map alone
};
// Two chunks of channels, full tiles and parts of one, more cells than threads, one position.
const Shape shapes[] = {
    {"7x7", 1, 70, 7, 7, 3, false, Layout::contiguous, false},
    {"7x7 center channels_last", 1, 66, 7, 7, 3, true, Layout::channels_last, false},
    {"5x3 center", 2, 33, 5, 3, 3, true, Layout::contiguous, true},
    {"7x8 sliced", 1, 6, 7, 8, 4, false, Layout::sliced, false},
    {"packs of channels_last", 1, 72, 7, 7, 3, false, Layout::channels_last, false},
    {"17x16 channels_last", 1, 3, 17, 16, 3, false, Layout::channels_last, false},
    {"14x14", 1, 72, 14, 14, 3, false, Layout::contiguous, false},
    {"8x8 center", 1, 40, 8, 8, 4, true, Layout::contiguous, false},
    {"1x1", 1, 9, 1, 1, 1, false, Layout::contiguous, false},
};
// For the kernels for 7x7: a step or half of one, a part of a tile in two samples, and in each of four chunks a part of
// a tile behind full ones.
const Shape sevens[] = {
    {"few", 1, 8, 7, 7, 3, false, Layout::contiguous, false},
    {"part of a tile", 2, 40, 7, 7, 3, false, Layout::contiguous, true},
    {"several tiles", 1, 520, 7, 7, 3, false, Layout::contiguous, false},
    {"part of a channels_last tile", 2, 40, 7, 7, 3, false, Layout::channels_last, false},
    {"several channels_last tiles", 1, 520, 7, 7, 3, false, Layout::channels_last, true},
};
// And for those for 14x14: less than a step, a part of a tile in two samples, and two chunks of several tiles.
const Shape fourteens[] = {
    {"few", 1, 2, 14, 14, 3, false, Layout::contiguous, false},
    {"part of a tile", 2, 22, 14, 14, 3, false, Layout::contiguous, true},
    {"several tiles", 1, 290, 14, 14, 3, false, Layout::contiguous, false},
    {"part of a channels_last tile", 2, 8, 14, 14, 3, false, Layout::channels_last, true},
    {"several channels_last tiles", 1, 296, 14, 14, 3, false, Layout::channels_last, false},
};
// In any layout it lies as in a contiguous one.
const Shape one_channel = {"one channel", 2, 1, 14, 14, 3, false, Layout::channels_last, false};

// The definition: maps of shape (N,D,H,W), one after the other, and the gradients by them.
struct Definition {
    const Shape &s;
    const std::vector<double> &a, &b, &grad_out;
    std::vector<double> out, grad_a, grad_b;

    Definition(const Shape &s, const std::vector<double> &a, const std::vector<double> &b,
               const std::vector<double> &grad_out)
        : s(s), a(a), b(b), grad_out(grad_out), out(size_t(s.n * s.h * s.w)), grad_a(a.size()), grad_b(b.size()) {
        for (long long n = 0; n < s.n; ++n)
            for (int k = 0; k < s.scales; ++k) {
                const long long rows = std::max(1ll, s.h >> k), columns = std::max(1ll, s.w >> k);
                for (long long i = 0; i < rows; ++i)
                    for (long long j = 0; j < columns; ++j)
                        cell(n, i, j, rows, columns);
            }
    }

    // How much of a coarse cell a fine position takes, corners not aligned.
    static double share(long long cell, long long cells, long long place, long long length) {
        const double at = std::fmin(std::fmax((place + 0.5) * cells / length - 0.5, 0.0), double(cells - 1));
        return std::fmax(0.0, 1 - std::fabs(at - cell));
    }

    void cell(long long n, long long i, long long j, long long rows, long long columns) {
        const long long y0 = i * s.h / rows, y1 = ((i + 1) * s.h + rows - 1) / rows;
        const long long x0 = j * s.w / columns, x1 = ((j + 1) * s.w + columns - 1) / columns;
        std::vector<double> pooled[2];
        for (int which = 0; which < 2; ++which) {
            const std::vector<double> &map = which ? b : a;
            double mean = 0;
            for (long long c = 0; c < s.d; ++c) {
                double sum = 0;
                for (long long y = y0; y < y1; ++y)
                    for (long long x = x0; x < x1; ++x)
                        sum += map[size_t(((n * s.d + c) * s.h + y) * s.w + x)];
                pooled[which].push_back(sum / ((y1 - y0) * (x1 - x0)));
                mean += pooled[which].back() / s.d;
            }
            for (double &value : pooled[which])
                value -= s.center ? mean : 0;
        }
        double ab = 0, aa = 0, bb = 0, arriving = 0;
        for (size_t c = 0; c < size_t(s.d); ++c)
            ab += pooled[0][c] * pooled[1][c], aa += pooled[0][c] * pooled[0][c], bb += pooled[1][c] * pooled[1][c];
        const double inverse = 1 / std::sqrt(aa * bb), cosine = ab * inverse;
        for (long long y = 0; y < s.h; ++y)
            for (long long x = 0; x < s.w; ++x) {
                const double weight = share(i, rows, y, s.h) * share(j, columns, x, s.w);
                const size_t at = size_t((n * s.h + y) * s.w + x);
                out[at] += weight * cosine, arriving += weight * grad_out[at];
            }
        arriving /= (y1 - y0) * (x1 - x0);
        for (size_t c = 0; c < size_t(s.d); ++c)
            for (long long y = y0; y < y1; ++y)
                for (long long x = x0; x < x1; ++x) {
                    const size_t at = size_t(((n * s.d + c) * s.h + y) * s.w + x);
                    grad_a[at] += arriving * (inverse * pooled[1][c] - cosine / aa * pooled[0][c]);
                    grad_b[at] += arriving * (inverse * pooled[0][c] - cosine / bb * pooled[1][c]);
                }
    }
};

template <class T>
m3em::Map map_of(Tensor<T> &t) {
    return {t.buffer.data(), {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}};
}

struct Stage {
    void (*entry)(const void *);
    int threads;
};
template <void (*kernel)(const m3em::ConsensusMapArguments)>
void enter(const void *given) {
    kernel(*static_cast<const m3em::ConsensusMapArguments *>(given));
}

// The kernels for maps of one dtype: every shape, 7x7, and 14x14.
template <class T>
struct Kernels;
#define KERNELS(T, dtype)                                                                                              \
    template <>                                                                                                        \
    struct Kernels<T> {                                                                                                \
        static constexpr Stage of[][3] = {                                                                             \
            {{enter<consensus_map_partial_##dtype##_any>, m3em::MapThreads},                                           \
             {enter<consensus_map_finish_##dtype##_any>, m3em::MapThreads},                                            \
             {enter<consensus_map_backward_##dtype##_any>, m3em::MapThreads}},                                         \
            {{enter<consensus_map_partial_##dtype##_7x7>, m3em::SevenThreads},                                         \
             {enter<consensus_map_finish_##dtype##_7x7>, m3em::FinishThreads},                                         \
             {enter<consensus_map_backward_##dtype##_7x7>, m3em::SevenThreads}},                                       \
            {{enter<consensus_map_partial_##dtype##_14x14>, m3em::FourteenThreads},                                    \
             {enter<consensus_map_finish_##dtype##_any>, m3em::MapThreads},                                            \
             {enter<consensus_map_backward_##dtype##_14x14>, m3em::FourteenThreads}},                                  \
        };                                                                                                             \
    };
KERNELS(float, f32)
KERNELS(__half, f16)

// `O` is the type of the result and of its gradient.
template <class T, class O = T>
Finding run(const Shape &s, m3em::MapForm form, simt::Order order) {
    Tensor<T> a(s.n, s.d, s.h, s.w, s.layout), b(s.n, s.d, s.h, s.w, s.layout);
    Tensor<O> out(s.n, 1, s.h, s.w, Layout::contiguous), grad_out(s.n, 1, s.h, s.w, s.layout);
    // Gradients have the layout of the maps without the gaps.
    const Layout dense = s.layout == Layout::sliced ? Layout::contiguous : s.layout;
    Tensor<T> grad_a(s.n, s.d, s.h, s.w, dense), grad_b(s.n, s.d, s.h, s.w, dense);
    Draw draw;
    const auto fill = [&](auto &t, Tensor<T> *beside) {
        for (long long n = 0; n < s.n; ++n)
            for (long long c = 0; c < t.shape[1]; ++c)
                for (long long y = 0; y < s.h; ++y)
                    for (long long x = 0; x < s.w; ++x)
                        set(t.at(n, c, y, x), draw() + (beside ? number(beside->at(n, c, y, x)) : 0));
    };
    fill(a, nullptr), fill(b, &a), fill(grad_out, nullptr);
    m3em::ConsensusMapArguments m = {};
    m.a = map_of(a), m.b = map_of(b), m.out = map_of(out), m.grad_out = map_of(grad_out);
    m.grad_a = map_of(grad_a), m.grad_b = s.only_a ? m3em::Map{} : map_of(grad_b);
    m.eps = 1e-8, m.center = s.center, m.scales = s.scales, m.wide = sizeof(O) != sizeof(T);
    m.n = int(s.n), m.d = int(s.d), m.h = int(s.h), m.w = int(s.w);
    if (form != m3em::MapForm::any && form != m3em::ConsensusMapPlan::form_of(m, sizeof(T)))
        return "there are no kernels for it";
    const m3em::ConsensusMapPlan plan(m, sizeof(T), form);
    Buffer<float> partial(size_t(plan.workspace)), stats(size_t(s.n * plan.stats));
    m.partial = partial.data(), m.stats = stats.data();
    const Stage *const stages = Kernels<T>::of[static_cast<int>(form)];
    const long long chunks = s.n * m.chunks, blocks[] = {chunks, s.n, chunks};
    const long long shared[] = {plan.partial_bytes, plan.finish_bytes, plan.backward_bytes};
    for (int stage = 0; stage < 3; ++stage)
        if (const char *error =
                simt::launch(stages[stage].entry, &m, blocks[stage], stages[stage].threads, shared[stage], order))
            return error;
    const std::vector<double> of_a = numbers(a), of_b = numbers(b), of_grad = numbers(grad_out);
    const Definition wanted(s, of_a, of_b, of_grad);
    const double tolerance = 64 * unit<T>;
    Finding finding = compare("result", numbers(out), wanted.out, 64 * unit<O>);
    if (s.d == 1) // gradients are 0 but for rounding
        return finding;
    if (finding.empty())
        finding = compare("gradient by a", numbers(grad_a), wanted.grad_a, tolerance);
    if (finding.empty() && !s.only_a)
        finding = compare("gradient by b", numbers(grad_b), wanted.grad_b, tolerance);
    return finding;
}

void run_all(const Check &check) {
    using m3em::MapForm;
    const auto both = [&](const Shape &s, MapForm form, const std::string &kernels) {
        check("float32 " + kernels + s.name, [&](simt::Order order) { return run<float>(s, form, order); });
        check("float16 " + kernels + s.name, [&](simt::Order order) { return run<__half>(s, form, order); });
    };
    for (const Shape &s : shapes)
        both(s, MapForm::any, "");
    for (const Shape &s : sevens)
        both(s, MapForm::seven, "seven ");
    for (const Shape &s : fourteens)
        both(s, MapForm::fourteen, "fourteen ");
    check("float32 fourteen one channel",
          [&](simt::Order order) { return run<float>(one_channel, MapForm::fourteen, order); });
    const auto wide = [&](const Shape &s, MapForm form, const std::string &kernels) {
        check("float16 " + kernels + "to float32",
              [&](simt::Order order) { return run<__half, float>(s, form, order); });
    };
    wide(shapes[3], MapForm::any, ""), wide(sevens[0], MapForm::seven, "seven ");
    wide(fourteens[0], MapForm::fourteen, "fourteen ");
}

const Op op = {"consensus_map", run_all};

} // namespace
