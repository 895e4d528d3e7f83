#include "simt/kernels.h"

#include <vector>

namespace simt {
namespace {

std::vector<const Kernel *> &kernels() {
    static std::vector<const Kernel *> all;
    return all;
}
} // namespace

Kernel::Kernel(const char *name, void (*run)(const void *), size_t size, int threads)
    : name(name), run(run), size(size), threads(threads) {
    kernels().push_back(this);
}

const Kernel *find_kernel(const char *name) {
    for (const Kernel *each : kernels())
        if (std::strcmp(each->name, name) == 0)
            return each;
    return nullptr;
}

} // namespace simt
