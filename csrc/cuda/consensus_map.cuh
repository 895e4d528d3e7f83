// What the host and the kernels of consensus_map agree on.
#pragma once

#include "cuda/arguments.cuh"

namespace m3em {
namespace {

constexpr int MapThreads = 256, MapBlocks = 4; // four blocks are half of the threads that a V100 can hold
// Blocks on a multiprocessor at least, as many as leave enough registers to a thread.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int MapBackwardBlocks = 2;
#else
constexpr int MapBackwardBlocks = 3;
#endif
constexpr int MaxScales = 16;

// The kernels for 7x7 maps. A row is 49 words, so it holds one channel of float or two of half.
constexpr int SevenThreads = 128, SevenPositions = 49;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
__host__ __device__ constexpr int seven_forward_blocks(int) { return 3; } // what the shared memory of a V100 holds
constexpr int SevenBackwardBlocks = 3;
#else
__host__ __device__ constexpr int seven_forward_blocks(int element) { return element == 4 ? 6 : 5; }
constexpr int SevenBackwardBlocks = 4;
#endif
constexpr int SevenForwardRows = 64, SevenBackwardRows = 32; // of each map in shared memory at a time
// Words between what belongs to both maps, so that the same row of both begins in other banks.
constexpr int SevenGap = 16;
// Words from row to row of what the backward adds: of the pitches tried, one that meets the fewest banks twice.
__host__ __device__ constexpr int seven_pitch(int channels) { return channels == 1 ? 25 : 55; }

// The kernels for 14x14 maps. A thread has two lines of a channel, so 126 threads have 18 channels.
constexpr int FourteenThreads = 128, FourteenPositions = 196, FourteenStep = 18;
constexpr int FourteenForwardBlocks = 3;
__host__ __device__ constexpr int fourteen_backward_blocks(int element) { return element == 4 ? 3 : 4; }
// Channels of each map in shared memory at a time, in the forward. In the backward it is a step.
__host__ __device__ constexpr int fourteen_tile(int element) { return FourteenStep * 4 / element; }

// One wave of blocks, where a card holds one for every sample.
constexpr int FinishThreads = 64;

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

// Numbers from channel to channel of a tile, for which `wide` numbers are 16 bytes, and its bytes. The numbers lie as
// in memory, or with a pack between channels that would all begin in one bank.
__host__ __device__ constexpr int even(int count) { return count + count % 2; }
__host__ __device__ constexpr long long tile_pitch(long long positions, int wide) {
    return positions % wide ? positions : positions + wide;
}
__host__ __device__ constexpr long long tile_bytes(long long channels, long long positions, int element) {
    return (channels * tile_pitch(positions, 16 / element) * element + 15) / 16 * 16;
}
// Numbers of the pooled values of both maps, and at least `spare`.
__host__ __device__ constexpr long long pooled_numbers(long long channels, int pooled, long long spare) {
    const long long both = 2 * channels * odd(pooled);
    return even(int(both > spare ? both : spare));
}

} // namespace
} // namespace m3em
