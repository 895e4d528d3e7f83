// What the host and the kernels of consensus_pool agree on.
#pragma once

#include "cuda/arguments.cuh"

namespace m3em {
namespace {

constexpr int PoolThreads = 256, PoolBlocks = 4;

// A tensor in the type of x or, `wide`, in the accumulation type.
struct Beside {
    void *data;
    long long stride[3];
    int wide;
};

struct ConsensusPoolArguments {
    Map x;            // (N,C,H,W); backward: no data where it is not read
    Map grad_x;       // backward; no data where no gradient is wanted
    Beside cmap;      // (N,H,W); no data for the plain mean
    Beside out;       // forward: (N,C)
    Beside grad_out;  // backward: (N,C)
    Beside grad_cmap; // backward: (N,H,W), contiguous; no data where no gradient is wanted
    void *partial;    // backward: [N][chunks][H*W], what a chunk of channels contributes to grad_cmap
    int n, c, h, w;
    int chunk;   // channels of a block; the last block of a sample may have fewer
    int chunks;  // blocks of a sample
    int tile;    // channels in shared memory at a time,
    int segment; // and positions; all of them where there is more than one channel
    int rows;    // all maps hold the numbers of a sample one after another, channel by channel
};

} // namespace
} // namespace m3em
