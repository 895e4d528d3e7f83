// What the host has to know to launch consensus_pool: sizes of blocks, of shared memory and of the workspace.
#pragma once

#include "cuda/consensus_pool.cuh"

namespace m3em {
namespace {

// Whether the form `packs` serves the call. Every sample has to begin with a whole pack: then none is served otherwise
// alone than in a batch.
inline bool packed(const ConsensusPoolArguments &m, int element) {
    const int wide = 16 / element;
    const long long positions = (long long)m.h * m.w;
    return m.rows && element < 8 && m.c * positions % wide == 0 && positions <= PackThreads * wide &&
           walkers(PackThreads, int(positions), wide) > 0 && in_packs(m.x, wide) && in_packs(m.grad_x, wide);
}

// Whether all maps that are there are channels_last in whole packs.
inline bool last_packed(const ConsensusPoolArguments &m, int element) {
    const int wide = 16 / element;
    return (m.x.data || m.grad_x.data) && !m.rows && element < 8 && m.c % wide == 0 &&
           last_in_packs(m.x, m.h, m.w, wide) && last_in_packs(m.grad_x, m.h, m.w, wide);
}

struct ConsensusPoolPlan {
    long long forward_bytes = 0, backward_bytes = 0, finish_bytes = 0; // of shared memory
    long long workspace = 0;                                           // numbers of `partial` for one sample

    // By C, H, W, dtype and form alone: a split that followed N or the card would change the order of sums. `element`:
    // bytes of a number of x.
    ConsensusPoolPlan(ConsensusPoolArguments &m, int element, bool packed) {
        const int number = element == 8 ? 8 : 4; // bytes of one that is added up
        const long long positions = (long long)m.h * m.w;
        // A block has some 50 KB to work on where there is enough for two or four of them: then a few samples fill a
        // card, and what each block does only once is a small part of it. At most 1024 channels, whose gradients have
        // to fit into shared memory.
        const long long bytes = m.c * positions * (packed ? element : number);
        int parts = bytes >= 128 << 10 ? 4 : bytes >= 32 << 10 ? 2 : 1;
        parts = parts < (m.c + 1023) / 1024 ? (m.c + 1023) / 1024 : parts;
        m.chunk = (m.c + parts - 1) / parts;
        m.chunk = m.chunk < m.c ? (m.chunk + 31) / 32 * 32 : m.c;
        m.chunks = (m.c + m.chunk - 1) / m.chunk;
        workspace = m.chunks * positions;
        if (packed)
            pack(m, int(positions), 16 / element);
        else
            any(m, positions, number);
        m.last = !packed && last_packed(m, element);
        if (m.last) {
            forward_bytes = 4LL * (m.segment + PoolThreads * (16 / element));
            backward_bytes = 4LL * (m.chunk + m.segment);
        }
    }

private:
    void pack(ConsensusPoolArguments &m, int positions, int wide) {
        m.walkers = walkers(PackThreads, positions, wide), m.channels = m.walkers * wide / positions;
        m.inverse = inverse_of(positions);
        // A thread adds 16 slots at most, which keeps all banks busy if it is an odd number of them.
        const int slots = (positions + 2 * wide - 2) / wide;
        while (slots > 16 << m.spread)
            ++m.spread;
        m.share = odd((slots + (1 << m.spread) - 1) >> m.spread);
        // Whole rounds of steps, as many as leave all blocks their place in the 96 KB of a V100.
        const int pitch = m.share << m.spread, round = PacksAhead * m.channels;
        const int rounds = (17 << 10) / (4 * round * pitch);
        m.tile = round * (rounds > 1 ? rounds : 1);
        const int kept = m.tile < m.chunk ? m.tile : m.chunk;
        m.groups = PackThreads / positions > 1 ? PackThreads / positions : 1;
        m.groups = m.groups < m.channels ? m.groups : m.channels;
        const long long weights = positions + wide - 1;
        forward_bytes = 4 * (weights + kept * pitch);
        backward_bytes = 4 * (weights + m.chunk + m.walkers * wide);
    }

    void any(ConsensusPoolArguments &m, long long positions, int number) {
        const long long room = (16 << 10) / number;
        m.segment = int(positions < room ? positions : room);
        m.tile = 1;
        while (m.tile * 2 <= m.chunk && m.segment == positions && m.tile * 2 * odd(m.segment) <= room)
            m.tile *= 2;
        const long long both = (long long)number * (m.tile * odd(m.segment) + m.segment);
        forward_bytes = both + (long long)number * m.tile;
        const long long groups = PoolThreads / m.segment > 1 ? PoolThreads / m.segment : 1;
        backward_bytes = both + (long long)number * (m.chunk + groups * m.segment);
    }
};

} // namespace
} // namespace m3em
