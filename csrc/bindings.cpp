// The Python module m3em_fast._C: pointers and sizes in, nothing of torch, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

#if !defined(M3EM_VERSION) || !defined(M3EM_FLAGS)
#error "setup.py passes M3EM_VERSION and M3EM_FLAGS"
#endif
#define M3EM_TEXT_OF(x) #x
#define M3EM_TEXT(x) M3EM_TEXT_OF(x)

namespace {

std::string compiler() {
    // clang says that it is gcc 4.2 as well, so it is asked first.
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

std::string architecture() {
#if defined(__x86_64__)
    return "x86_64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "other";
#endif
}

// What every instruction outside of the kernels that are chosen at run time may use.
py::list instruction_sets() {
    py::list sets;
#if defined(__SSE2__)
    sets.append("sse2");
#endif
#if defined(__AVX2__)
    sets.append("avx2");
#endif
#if defined(__FMA__)
    sets.append("fma");
#endif
#if defined(__F16C__)
    sets.append("f16c");
#endif
#if defined(__AVX512F__)
    sets.append("avx512f");
#endif
#if defined(__ARM_NEON)
    sets.append("neon");
#endif
    return sets;
}

py::object openmp() {
#if defined(_OPENMP)
    return py::int_(_OPENMP);
#else
    return py::none();
#endif
}

py::dict build_info() {
    py::dict info;
    info["version"] = M3EM_VERSION;
    info["compiler"] = compiler();
    info["cplusplus"] = static_cast<long>(__cplusplus);
    info["flags"] = M3EM_FLAGS;
    info["openmp"] = openmp();
    info["pybind11"] =
        M3EM_TEXT(PYBIND11_VERSION_MAJOR) "." M3EM_TEXT(PYBIND11_VERSION_MINOR) "." M3EM_TEXT(PYBIND11_VERSION_PATCH);
    info["python"] = PY_VERSION;
    info["architecture"] = architecture();
    info["instruction_sets"] = instruction_sets();
    return info;
}

} // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of m3em_fast. They take addresses and sizes; m3em_fast.ops is for people.";
    module.def(
        "build_info", &build_info,
        "What this module was built with. openmp is the date of the standard as the compiler gives it, or None.");
}
