// What the host has to know to launch consensus_map: sizes of blocks, of shared memory and of the workspace.
#pragma once

#include "cuda/consensus_map.cuh"

namespace m3em {
namespace {

struct ConsensusMapPlan {
    long long cells = 0, sums = 0;
    long long partial_bytes = 0, finish_bytes = 0, backward_bytes = 0; // of shared memory
    long long workspace = 0;                                           // numbers of `partial`
    long long stats = 0;                                               // numbers of `stats` for every sample
    bool seven = false;                                                // the kernels for 7x7 and three scales serve it

    // Fills in how the channels are split. By D, H, W, the scales and the size of a number alone: a split that followed
    // N or the card would change the order of sums with them.
    ConsensusMapPlan(ConsensusMapArguments &m, int number, bool half_or_float) {
        const long long positions = (long long)m.h * m.w;
        for (int k = 0; k < m.scales; ++k)
            cells += (long long)(m.h >> k > 1 ? m.h >> k : 1) * (m.w >> k > 1 ? m.w >> k : 1);
        sums = m.center ? 5 : 3;
        stats = 3 * cells + (m.center ? 2 * positions : 0);
        // Four chunks where each still has a full tile, so that a few samples fill a card too.
        const int parts = m.d >= 128 ? 4 : m.d >= 64 ? 2 : 1;
        m.chunk = (m.d + parts - 1) / parts;
        m.chunk = m.chunk < m.d ? (m.chunk + 31) / 32 * 32 : m.d;
        m.chunks = (m.d + m.chunk - 1) / m.chunk;
        const long long channel = 2 * number * (odd(int(positions)) + odd(int(cells - positions)));
        const long long groups = MapThreads / cells > 1 ? MapThreads / cells : 1;
        // A tile of 32 channels, or as many as leave room for four blocks in the 96 KB of a V100.
        m.tile = 32;
        while (m.tile > 1 && m.tile * channel > 18 << 10)
            m.tile /= 2;
        if (m.tile > m.chunk)
            m.tile = m.chunk;
        partial_bytes = m.tile * channel + number * groups * cells * sums;
        finish_bytes = number * cells;
        backward_bytes = m.tile * channel + number * (3 * cells + positions);
        workspace = (long long)m.n * m.chunks * cells * sums;
        seven = half_or_float && m.h == 7 && m.w == 7 && m.scales == 3;
    }
};

} // namespace
} // namespace m3em
