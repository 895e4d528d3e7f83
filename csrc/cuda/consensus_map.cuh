// What the host and the kernels of consensus_map agree on.
#pragma once

#include "cuda/arguments.cuh"

namespace m3em {
namespace {

constexpr int MapThreads = 256, MapBlocks = 4; // four blocks are half of the threads that a V100 can hold
constexpr int MaxScales = 16;

struct ConsensusMapArguments {
    Map a, b;           // (N,D,H,W)
    Map out;            // forward: (N,1,H,W)
    Map grad_out;       // backward: (N,1,H,W), any strides
    Map grad_a, grad_b; // backward; no data where no gradient is wanted
    void *partial;      // [N][chunks][cells][3, with `center` 5]: what a chunk of channels contributes
    void *stats; // [N][3 * cells, with `center` + 2 * positions], see consensus_map.cu; may be null in the forward
    double eps;
    int n, d, h, w, scales;
    int center;
    int chunk;  // channels of a block; the last block of a sample may have fewer
    int chunks; // blocks of a sample
    int tile;   // channels in shared memory at a time
    int wide;   // out and grad_out are in the accumulation type, whatever the maps are
};

} // namespace
} // namespace m3em
