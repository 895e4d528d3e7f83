// What the host and the kernels of consensus_pool agree on.
#pragma once

#include "cuda/arguments.cuh"

namespace m3em {
namespace {

constexpr int PoolThreads = 256, PoolBlocks = 4;

// The form `packs`. 196 of 224 threads, 4 times 49, meet whole channels at 7x7 and at 14x14 in a step, and each of
// their steps begins at a multiple of 64 bytes. In the forward a thread waits for PacksAhead packs at a time.
constexpr int PackThreads = 224, PackBlocks = 5, PacksAhead = 4;

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

    // The form `packs`.
    int walkers;      // threads that walk, see walkers(); 0 in the form `any`
    int channels;     // of a step
    int share;        // forward: slots, one for each of a channel's packs, that a thread adds, and
    int spread;       // how many threads add those of a channel: 2 to this power
    int groups;       // backward: threads that add for one position of the map's gradient
    unsigned inverse; // of h * w, see quotient()

    int last; // the form `any`: all maps are channels_last in whole packs
};

} // namespace
} // namespace m3em
