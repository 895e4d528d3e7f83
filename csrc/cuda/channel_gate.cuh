// What the host and the kernels of channel_gate agree on.
#pragma once

#include "cuda/arguments.cuh"

namespace m3em {
namespace {

constexpr int GateThreads = 256, GateBlocks = 4, MaxGates = 8;
constexpr int GateBackwardBlocks = 3; // of the form `any`: four spill

// A tensor (N,C), in the type of the maps or, `wide`, in the accumulation type.
struct Gate {
    void *data;
    long long stride[2];
    int wide;
};

struct ChannelGateArguments {
    Map x;                // (N,C,H,W)
    Map out;              // forward: (N,G*C,H,W)
    Map grad_out;         // backward: (N,G*C,H,W), any strides
    Map grad_x;           // backward; no data where no gradient is wanted
    Gate gates[MaxGates]; // no data where only a gradient by x, which is not wanted, would need it
    Gate grads[MaxGates]; // backward; no data where no gradient is wanted
    int n, c, h, w, num_gates;
    int chunk;    // channels of a block; the last block of a sample may have fewer
    int chunks;   // blocks of a sample
    int active;   // form `packs`: threads that walk, see walkers(); 0 in the form `any`
    int channels; // channels of a step of the walk
    int packs;    // of a chunk
    int halves;   // backward: 2^halves threads add the sums of packs of one channel
    int rows;     // all maps hold the numbers of a sample one after another, channel by channel, in one type
    int last;     // form `any`: threads that walk where all maps are channels_last in whole packs, in one type; or 0
    int lanes;    // else: that take a channel whose positions lie one after another in all maps; or 0
    int across;   // else: neighbouring threads take neighbouring channels, not positions
    int wide;     // out and grad_out are in the accumulation type, whatever x is; then not `rows`
};

} // namespace
} // namespace m3em
