// What the standalone program asks of an op: a file standalone_<op>.cpp with one `const Op op = {name, run};` in it.
#pragma once

#include "simt/simt.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <cuda_fp16.h>

namespace standalone {

// Memory of exactly `count` numbers, full of NaN until it is written to.
template <class T>
class Buffer {
public:
    explicit Buffer(size_t count) : size(count), memory(static_cast<T *>(std::malloc(count * sizeof(T)))) {
        std::memset(static_cast<void *>(memory), 0xff, count * sizeof(T));
    }
    ~Buffer() { std::free(memory); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    T &operator[](size_t i) { return memory[i]; }
    T *data() { return memory; }
    const size_t size;

private:
    T *const memory;
};

inline double number(float x) { return x; }
inline double number(__half x) { return __half2float(x); }
inline void set(float &to, double x) { to = float(x); }
inline void set(__half &to, double x) { to = __float2half_rn(float(x)); }
template <class T>
constexpr double unit = 1.0 / (1 << 24);
template <>
constexpr double unit<__half> = 1.0 / (1 << 11);

// Numbers from -1 to 1, the same on every machine.
class Draw {
public:
    double operator()() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return double(state >> 11) / double(1ull << 52) - 1;
    }

private:
    unsigned long long state = 1;
};

// A tensor (N,C,H,W) in a buffer of its own. Between the numbers of a sliced one there is NaN.
enum class Layout { contiguous, channels_last, sliced };
template <class T>
struct Tensor {
    Tensor(long long n, long long c, long long h, long long w, Layout layout)
        : shape{n, c, h, w}, step(layout == Layout::sliced ? 2 : 1), buffer(size_t((n * c * h * w - 1) * step + 1)) {
        const bool last = layout == Layout::channels_last;
        stride[0] = c * h * w * step, stride[1] = (last ? 1 : h * w) * step;
        stride[2] = w * (last ? c : 1) * step, stride[3] = (last ? c : 1) * step;
    }
    T &at(long long n, long long c, long long y, long long x) {
        return buffer[size_t(n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3])];
    }
    long long shape[4], stride[4], step;
    Buffer<T> buffer;
};

// The numbers of a tensor in the order N, C, H, W.
template <class T>
std::vector<double> numbers(Tensor<T> &t) {
    std::vector<double> found;
    for (long long n = 0; n < t.shape[0]; ++n)
        for (long long c = 0; c < t.shape[1]; ++c)
            for (long long y = 0; y < t.shape[2]; ++y)
                for (long long x = 0; x < t.shape[3]; ++x)
                    found.push_back(number(t.at(n, c, y, x)));
    return found;
}

// What one run of a case found: nothing, or in one line what is wrong.
using Finding = std::string;

// Coarse: it is to show that the kernel that a sanitizer looked at did the work. The sharp bound is in the tests.
inline Finding compare(const char *what, const std::vector<double> &found, const std::vector<double> &wanted,
                       double tolerance) {
    double largest = 0;
    for (double x : wanted)
        largest = std::fmax(largest, std::fabs(x));
    for (size_t i = 0; i < wanted.size(); ++i)
        if (!(std::fabs(found[i] - wanted[i]) <= tolerance * largest)) {
            char text[200];
            std::snprintf(text, sizeof(text), "%s %zu of %zu is %.6g where %.6g is right%s", what, i, wanted.size(),
                          found[i], wanted[i], found[i] != found[i] ? " (not written, or made of such a number)" : "");
            return text;
        }
    return "";
}

// Runs a case under a name and says in one line how it went.
using Check = std::function<void(const std::string &, const std::function<Finding(simt::Order)> &)>;

struct Op {
    Op(const char *name, void (*run)(const Check &));
    const char *name;
    void (*run)(const Check &);
    const Op *next;
};

} // namespace standalone
