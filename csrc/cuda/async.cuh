// Copies from global to shared memory, 16 bytes each, that nobody waits for until await_copies(): where a card has them
// (compute capability 8.0 on) they take no registers while they are on their way. Elsewhere they are a load and a
// store.
#pragma once

#include "cuda/device.cuh"

namespace m3em {
namespace {

#ifdef M3EM_SIMT
using simt::await_copies;
inline void copy_pack(void *to, const void *from) { simt::copy_later(to, from, 16); }
#elif __CUDA_ARCH__ >= 800
__device__ inline void copy_pack(void *to, const void *from) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(__cvta_generic_to_global(from)) : "memory");
}
// A thread waits for its own; others may read what came after the next barrier.
__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
__device__ inline void copy_pack(void *to, const void *from) {
    *static_cast<uint4 *>(to) = *static_cast<const uint4 *>(from);
}
__device__ inline void await_copies() {}
#endif

} // namespace
} // namespace m3em
