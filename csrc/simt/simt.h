// Runs a CUDA kernel on the CPU, block by block, with real threads of a block, barriers, warps and shared memory.
//
// A thread of a block is a fiber: it runs until it has to wait, then the next one does. The order is a choice, so that
// a test can take several: a kernel that forgets a barrier gives another result, or NaN, in one of them. With
// M3EM_SIMT_THREADS defined it is a thread of the host, for ThreadSanitizer. What no card forgives is an error here, in
// one sentence with file and line: a barrier that not all threads of a block reach, or reach at different places; lanes
// that wait for lanes which do not come, or which come with another mask or from another place; a shuffle that reads a
// lane that has left the kernel or that its mask does not name; a thread that leaves with copies it has not waited for.
//
// What this net does not catch:
//  - races between blocks, which run one after another, and between kernels;
//  - a function with a barrier in it that some threads call from one place and some from another (two barriers on one
//    line are told apart, two calls of one barrier are not);
//  - with fibers, a race between two threads whose order makes no difference to the result, because a fiber runs
//    undisturbed from one point of waiting to the next; ThreadSanitizer is there for those;
//  - out of bounds inside one allocation, alignment (but that of copies that are waited for later), registers,
//    occupancy, bank conflicts, and whatever a card's own arithmetic does differently (contraction to fma, denormal
//    numbers, __expf and its like).
// It is stricter than a card from Volta on where a thread leaves before the others come to a barrier.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define M3EM_SIMT
#define __global__
#define __device__
#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define M3EM_SHARED(name) unsigned char *const name = ::simt::shared()
#define threadIdx (::simt::thread())
#define blockIdx (::simt::block())

// __COUNTER__ tells two barriers on one line apart.
#define M3EM_SIMT_HERE                                                                                                 \
    ::simt::Place { __FILE__, __LINE__, __COUNTER__ }
#define __syncthreads() ::simt::barrier(M3EM_SIMT_HERE)
#define __syncwarp(...) ::simt::warp_barrier(M3EM_SIMT_HERE, ##__VA_ARGS__)
#define __ballot_sync(mask, predicate) ::simt::vote(M3EM_SIMT_HERE, mask, (predicate) != 0)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, (predicate) == 0) == 0)
#define __shfl_sync(mask, ...) ::simt::shuffle(M3EM_SIMT_HERE, ::simt::Way::from, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) ::simt::shuffle(M3EM_SIMT_HERE, ::simt::Way::up, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) ::simt::shuffle(M3EM_SIMT_HERE, ::simt::Way::down, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) ::simt::shuffle(M3EM_SIMT_HERE, ::simt::Way::across, mask, __VA_ARGS__)

namespace simt {

struct Index {
    unsigned x, y, z;
};

// In the source, of something to wait at.
struct Place {
    const char *file;
    int line, number;
};

enum class Way { from, up, down, across };

const Index &thread();
const Index &block();
unsigned char *shared();
void barrier(const Place &place);
void warp_barrier(const Place &place, unsigned mask = 0xffffffffu);
unsigned vote(const Place &place, unsigned mask, bool predicate);
// A copy that is made when this thread waits for its copies, and not before. A card may write at any time between, so
// until then its place is full of NaN, whatever was there.
void copy_later(void *to, const void *from, size_t bytes);
void await_copies();
uint64_t shuffle_bits(const Place &place, Way way, unsigned mask, uint64_t bits, int other, int width);

template <class T>
T shuffle(const Place &place, Way way, unsigned mask, T value, int other, int width = 32) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle_bits(place, way, mask, bits, other, width);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

enum class Order : int { forward = 0, reverse = 1, shuffled = 2 };

// Runs `kernel(arguments)` for a grid of `blocks` blocks of `threads` threads. Shared memory is of the exact size and
// full of NaN before every block. Returns null, or what went wrong in one line (valid until the next call).
const char *launch(void (*kernel)(const void *), const void *arguments, int64_t blocks, int threads, int64_t shared,
                   Order order);

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

} // namespace simt
