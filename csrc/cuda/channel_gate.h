// What the host has to know to launch channel_gate: sizes of blocks and of shared memory.
#pragma once

#include "cuda/channel_gate.cuh"

#include <climits>

namespace m3em {
namespace {

struct ChannelGatePlan {
    long long forward_bytes = 0, backward_bytes = 0; // of shared memory
    bool seven = false;                              // the kernels for 7x7 serve it

    ChannelGatePlan(ChannelGateArguments &m, int number, bool half_or_float) {
        const long long positions = (long long)m.h * m.w;
        // Channels whose slab is a few packs for every thread, and whole packs in any type.
        // A slab's numbers are counted in 32 bits.
        m.chunk = positions < INT_MAX / 8 ? 8 : 1;
        while (m.chunk < 256 && m.chunk * positions < 8192)
            m.chunk *= 2;
        if (m.chunk > m.c)
            m.chunk = m.c;
        m.chunks = (m.c + m.chunk - 1) / m.chunk;
        // Products of a tile of channels; of a part of one channel where it is long.
        const long long room = (16 << 10) / (number * m.num_gates);
        m.segment = int(positions < room ? positions : room);
        m.tile = 1;
        while (m.tile * 2 <= m.chunk && m.segment == positions && m.tile * 2 * odd(m.segment) <= room)
            m.tile *= 2;
        forward_bytes = (long long)number * m.num_gates * m.chunk;
        backward_bytes = 2 * forward_bytes + (long long)number * m.num_gates * m.tile * odd(m.segment);
        seven = half_or_float && m.h == 7 && m.w == 7;
    }
};

} // namespace
} // namespace m3em
