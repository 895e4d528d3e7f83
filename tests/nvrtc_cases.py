"""A stand-in for NVRTC, which the tests build: it knows no sm_70, as NVRTC 13 does, takes no time, and counts."""

import os
import subprocess

# An "image" is what was compiled for which architecture; a source with the word `broken` does not compile.
SOURCE = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
struct Program { std::string source, image, log; };
typedef Program *P;
extern "C" {
const char *nvrtcGetErrorString(int e) { return e == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_SUCCESS"; }
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
int nvrtcGetNumSupportedArchs(int *n) { return *n = 5, 0; }
int nvrtcGetSupportedArchs(int *a) {
    const int all[] = {75, 80, 90, 100, 120};
    return memcpy(a, all, sizeof all), 0;
}
int nvrtcCreateProgram(P *p, const char *source, const char *, int, const char *const *, const char *const *) {
    return *p = new Program{source, "", ""}, 0;
}
int nvrtcDestroyProgram(P *p) { return delete *p, *p = nullptr, 0; }
int nvrtcCompileProgram(P p, int count, const char *const *options) {
    if (const char *name = getenv("FAKE_NVRTC_COUNT"))
        if (FILE *file = fopen(name, "a"))
            fprintf(file, "%s\n", options[0]), fclose(file);
    p->log = "line 1: a word about the source";
    for (int i = 0; i < count; ++i)
        p->image += options[i] + std::string("\n");
    return p->image += p->source, p->source.find("broken") == std::string::npos ? 0 : 6;
}
int nvrtcGetProgramLogSize(P p, size_t *n) { return *n = p->log.size() + 1, 0; }
int nvrtcGetProgramLog(P p, char *to) { return strcpy(to, p->log.c_str()), 0; }
int nvrtcGetCUBINSize(P p, size_t *n) { return *n = p->image.size() + 1, 0; }
int nvrtcGetCUBIN(P p, char *to) { return strcpy(to, p->image.c_str()), 0; }
int nvrtcGetPTXSize(P p, size_t *n) { return *n = p->image.size() + 1, 0; }
int nvrtcGetPTX(P p, char *to) { return strcpy(to, p->image.c_str()), 0; }
}
"""


def fake(folder):
    """The variables with which a build finds it, and nothing of an earlier build."""
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_fp16.h").touch()
    (folder / "include/cuda.h").write_text("#define CUDA_VERSION 13000\n")
    library, source = folder / "lib/libnvrtc.so.13", folder / "nvrtc.cpp"
    library.parent.mkdir()
    source.write_text(SOURCE)
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"M3EM_NVRTC": library, "M3EM_CACHE": folder / "cache", "FAKE_NVRTC_COUNT": folder / "count"}


def compilations(variables):
    """The architectures compiled for since the last look."""
    count = variables["FAKE_NVRTC_COUNT"]
    found = count.read_text().split() if count.exists() else []
    count.unlink(missing_ok=True)
    return sorted(line.partition("=")[2] for line in found)
