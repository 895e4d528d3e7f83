// What the host has to know to launch consensus_pool: sizes of blocks, of shared memory and of the workspace.
#pragma once

#include "cuda/consensus_pool.cuh"

namespace m3em {
namespace {

struct ConsensusPoolPlan {
    long long forward_bytes = 0, backward_bytes = 0, finish_bytes = 0; // of shared memory
    long long workspace = 0;                                           // numbers of `partial` for one sample
    bool seven = false;                                                // the kernels for 7x7 serve it

    // By C, H, W and the size of a number alone: a split that followed N or the card would change the order of sums.
    ConsensusPoolPlan(ConsensusPoolArguments &m, int number, bool half_or_float) {
        const long long positions = (long long)m.h * m.w;
        // Four chunks where each still has a few tiles, so that a few samples fill a card too. More where the gradients
        // of a chunk's channels would not fit into the 64 KB of shared memory that every card has.
        const int parts = m.c > 4096 ? (m.c + 1023) / 1024 : m.c >= 256 ? 4 : m.c >= 64 ? 2 : 1;
        m.chunk = (m.c + parts - 1) / parts;
        m.chunk = m.chunk < m.c ? (m.chunk + 31) / 32 * 32 : m.c;
        m.chunks = (m.c + m.chunk - 1) / m.chunk;
        const long long room = (16 << 10) / number;
        m.segment = int(positions < room ? positions : room);
        m.tile = 1;
        while (m.tile * 2 <= m.chunk && m.segment == positions && m.tile * 2 * odd(m.segment) <= room)
            m.tile *= 2;
        const long long both = (long long)number * (m.tile * odd(m.segment) + m.segment);
        forward_bytes = both + (long long)number * m.tile;
        const long long groups = PoolThreads / m.segment > 1 ? PoolThreads / m.segment : 1;
        backward_bytes = both + (long long)number * (m.chunk + groups * m.segment);
        workspace = m.chunks * positions;
        seven = half_or_float && m.h == 7 && m.w == 7;
    }
};

} // namespace
} // namespace m3em
