// 16 bytes on their way from memory, as words. A number of half a word that is loaded under a condition has to be put
// into its word, so a thread would wait for it where it asks for it, not where it uses it.
#pragma once

#include "cuda/slab.cuh"

namespace m3em {
namespace {

struct __align__(16) Words {
    unsigned at[4];
};
__device__ inline Words load_words(const void *from) { return *static_cast<const Words *>(from); }

// The numbers that they are.
template <class T>
__device__ inline Few<T, 16 / sizeof(T)> unpacked(const Words &words) {
    Few<T, 16 / sizeof(T)> few;
    memcpy(&few, &words, sizeof(few));
    return few;
}

} // namespace
} // namespace m3em
