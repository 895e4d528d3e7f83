// What the host has to know to launch channel_gate: sizes of blocks and of shared memory.
#pragma once

#include "cuda/channel_gate.cuh"

#include <climits>
#include <initializer_list>

namespace m3em {
namespace {

// Whether the form `packs` serves: all maps are whole packs of 16 aligned bytes in every sample, and there is a walk.
inline bool packed(const ChannelGateArguments &m, int element) {
    const int wide = 16 / element;
    const long long positions = (long long)m.h * m.w;
    if (!m.rows || element == 8 || walkers(GateThreads, int(positions), wide) == 0 || m.c * positions % wide != 0)
        return false;
    for (const Map *map : {&m.x, &m.out, &m.grad_out, &m.grad_x})
        if (!in_packs(*map, wide))
            return false;
    return true;
}

// Whether the positions of a channel lie one after another in every map that is there.
inline bool in_lines(const ChannelGateArguments &m) {
    for (const Map *map : {&m.x, &m.out, &m.grad_out, &m.grad_x})
        if (map->data && ((m.w > 1 && map->stride[3] != 1) || (m.h > 1 && map->stride[2] != m.w)))
            return false;
    return true;
}

// Whether all maps are channels_last in whole packs, and every gated copy begins with one.
inline bool last_packed(const ChannelGateArguments &m, int element) {
    const int wide = 16 / element;
    const bool known = m.out.data || m.grad_out.data;
    if (!known || m.rows || m.wide || element == 8 || m.c % wide != 0)
        return false;
    for (const Map *map : {&m.x, &m.out, &m.grad_out, &m.grad_x})
        if (!last_in_packs(*map, m.h, m.w, wide))
            return false;
    return true;
}

struct ChannelGatePlan {
    long long forward_bytes = 0, backward_bytes = 0; // of shared memory

    // By C, H, W, the gates and the dtype alone. `element`: bytes of a number of the maps. `packed` as above.
    ChannelGatePlan(ChannelGateArguments &m, int element, bool packed) {
        const int number = element == 8 ? 8 : 4; // bytes of one that is added up
        if (packed)
            plan_packs(m, number, 16 / element);
        else if (last_packed(m, element))
            plan_last(m, 16 / element);
        else
            plan_any(m, number);
    }

private:
    void plan_packs(ChannelGateArguments &m, int number, int wide) {
        const int positions = m.h * m.w;
        m.active = walkers(GateThreads, positions, wide);
        int unit = 1; // channels that are whole packs
        while (unit * positions % wide != 0)
            unit *= 2;
        // Several steps, as far as there is room for the gates and their sums, and blocks of one size.
        m.channels = m.active * wide / positions;
        const long long step = (long long)number * m.num_gates * (m.active + 2 * m.channels), room = 20 << 10;
        const int most = m.channels * int(room > step ? room / step < 8 ? room / step : 8 : 1);
        m.chunks = (m.c + most - 1) / most;
        m.chunk = ((m.c + m.chunks - 1) / m.chunks + unit - 1) / unit * unit;
        m.chunks = (m.c + m.chunk - 1) / m.chunk;
        m.packs = m.chunk * positions / wide;
        for (m.halves = 0; (positions / wide + 2) >> m.halves > 16;)
            ++m.halves;
        forward_bytes = (long long)number * m.num_gates * m.chunk;
        backward_bytes = forward_bytes + (long long)number * m.num_gates * (m.packs + m.chunk);
    }

    void plan_last(ChannelGateArguments &m, int wide) {
        const long long positions = (long long)m.h * m.w;
        // At least 128 bytes of a position, and of those as many as are a few packs for every thread.
        m.chunk = 64;
        while (m.chunk < 256 && m.chunk * positions < 8192)
            m.chunk *= 2;
        if (m.chunk > m.c)
            m.chunk = m.c;
        m.chunks = (m.c + m.chunk - 1) / m.chunk;
        // Each has a sum for every number of a pack and every gate.
        m.last = m.num_gates > 4 ? GateThreads / 2 : GateThreads;
        forward_bytes = 4LL * m.num_gates * m.chunk;
        backward_bytes = forward_bytes + 4LL * m.num_gates * m.last * wide;
    }

    void plan_any(ChannelGateArguments &m, int number) {
        const long long positions = (long long)m.h * m.w;
        // Channels whose slab is a few packs for every thread, and whole packs in any type.
        // A slab's numbers are counted in 32 bits.
        m.chunk = positions < INT_MAX / 8 ? 8 : 1;
        while (m.chunk < 256 && m.chunk * positions < 8192)
            m.chunk *= 2;
        if (m.chunk > m.c)
            m.chunk = m.c;
        m.chunks = (m.c + m.chunk - 1) / m.chunk;
        for (m.lanes = in_lines(m) ? 4 : 0; m.lanes && m.lanes < 32 && m.lanes < positions;)
            m.lanes *= 2;
        forward_bytes = (long long)number * m.num_gates * m.chunk;
        backward_bytes = 2 * forward_bytes;
    }
};

} // namespace
} // namespace m3em
