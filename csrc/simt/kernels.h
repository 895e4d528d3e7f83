// Device code by the names of its kernels, for the fake driver library (driver.cpp).
//
// A file includes this, then a .cu file: every M3EM_KERNEL there becomes a function of the host and an entry here.
#pragma once

#include "simt/simt.h"

#include "cuda/device.cuh"

#include <cstddef>

namespace simt {

struct Kernel {
    const char *name;
    void (*run)(const void *arguments);
    size_t size; // of the arguments
    int threads; // of a block, at most

    Kernel(const char *name, void (*run)(const void *), size_t size, int threads);
};

const Kernel *find_kernel(const char *name);

} // namespace simt

#undef M3EM_KERNEL
#define M3EM_KERNEL(name, threads, blocks, arguments, ...)                                                             \
    static const ::simt::Kernel name(                                                                                  \
        #name, [](const void *given) { __VA_ARGS__(*static_cast<const arguments *>(given)); }, sizeof(arguments),      \
        threads);
