// OpenMP's own functions, for a process in which there is no OpenMP library: the kernels then run on one thread.
//
// g++ would note libgomp.so.1 in the extension as a library to load. Older releases of torch have their copy under
// another name: where the system has none the import then fails, and where it has one that is loaded as well. The
// functions are therefore defined here, which leaves the linker nothing to look for, and are visible, so that the
// loader prefers the process's global symbols. There torch puts its copy, whatever its name.
#if defined(_OPENMP)
#include <omp.h>
#endif

#define M3EM_VISIBLE extern "C" __attribute__((visibility("default")))

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && defined(__ELF__)
M3EM_VISIBLE void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }
M3EM_VISIBLE void GOMP_barrier() {}
M3EM_VISIBLE int omp_get_num_threads() noexcept { return 1; }
M3EM_VISIBLE int omp_get_thread_num() noexcept { return 0; }
#endif

// An address in the library whose threads the kernels use, which can be this one; null where there is no OpenMP at all.
M3EM_VISIBLE const void *m3em_openmp() {
#if defined(_OPENMP)
    return reinterpret_cast<const void *>(&omp_get_num_threads);
#else
    return nullptr;
#endif
}
