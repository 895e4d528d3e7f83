// What the host has to know to launch consensus_map: sizes of blocks, of shared memory and of the workspace.
#pragma once

#include "cuda/consensus_map.cuh"

namespace m3em {
namespace {

// Which kernels serve a call.
enum class MapForm { any, seven, fourteen };

struct ConsensusMapPlan {
    long long cells = 0, sums = 0;
    long long partial_bytes = 0, finish_bytes = 0, backward_bytes = 0; // of shared memory
    long long workspace = 0;                                           // numbers of `partial`
    long long stats = 0;                                               // numbers of `stats` for every sample

    // Fills in how the channels are split. By D, H, W, the scales and the size of a number alone: a split that followed
    // N or the card would change the order of sums with them. `element`: bytes of a number of the maps.
    ConsensusMapPlan(ConsensusMapArguments &m, int element, MapForm form) : number(element == 8 ? 8 : 4) {
        const long long positions = (long long)m.h * m.w;
        for (int k = 0; k < m.scales; ++k)
            cells += (long long)rows(m, k) * columns(m, k);
        sums = m.center ? 5 : 3;
        stats = 3 * cells + (m.center ? 2 * positions : 0);
        finish_bytes = number * cells;
        if (form == MapForm::seven)
            split_seven(m, 4 / element);
        else if (form == MapForm::fourteen)
            split_fourteen(m, element);
        else
            split(m, element);
        m.chunks = (m.d + m.chunk - 1) / m.chunk;
        workspace = (long long)m.n * m.chunks * cells * sums;
    }

    // The kernels that there are for these sizes, if the maps are contiguous or channels_last in whole packs.
    static MapForm form_of(const ConsensusMapArguments &m, int element) {
        const bool packs = m.d > 0 && (long long)m.d * m.h * m.w * element % 16 == 0;
        if (element == 8 || m.h != m.w || m.scales != 3 || m.center || !packs)
            return MapForm::any;
        return m.h == 7 ? MapForm::seven : m.h == 14 ? MapForm::fourteen : MapForm::any;
    }

private:
    const int number; // bytes of the accumulation type

    static int rows(const ConsensusMapArguments &m, int k) { return m.h >> k > 1 ? m.h >> k : 1; }
    static int columns(const ConsensusMapArguments &m, int k) { return m.w >> k > 1 ? m.w >> k : 1; }

    void split(ConsensusMapArguments &m, int element) {
        const long long positions = (long long)m.h * m.w;
        const int pooled = int(cells - positions);
        // Four chunks where each still has a full tile, so that a few samples fill a card too.
        const int parts = m.d >= 128 ? 4 : m.d >= 64 ? 2 : 1;
        m.chunk = (m.d + parts - 1) / parts;
        m.chunk = m.chunk < m.d ? (m.chunk + 31) / 32 * 32 : m.d;
        const auto tiles = [&](int channels, long long spare) {
            return 2 * tile_bytes(channels, positions, element) + number * pooled_numbers(channels, pooled, spare);
        };
        // A tile of 32 channels, or as many as leave room for four blocks in the 96 KB of a V100.
        m.tile = 32;
        while (m.tile > 1 && tiles(m.tile, 0) > 20 << 10)
            m.tile /= 2;
        if (m.tile > m.chunk)
            m.tile = m.chunk;
        const long long groups = MapThreads / cells > 1 ? MapThreads / cells : 1;
        const long long windows = m.tile > 1 ? pooled * 8LL : 0;
        partial_bytes = tiles(m.tile, 0) + windows + number * groups * cells * sums;
        backward_bytes = tiles(m.tile, positions + m.h * columns(m, 1)) + windows + number * 3 * cells +
                         4 * (m.scales - 1) * (m.h + m.w);
    }

    // Up to four chunks of eight steps or more each, so that what a block does once weighs little.
    void split_fourteen(ConsensusMapArguments &m, int element) {
        const int most = m.d / (8 * FourteenStep), parts = most < 1 ? 1 : most < 4 ? most : 4;
        m.chunk = ((m.d + parts - 1) / parts + FourteenStep - 1) / FourteenStep * FourteenStep;
        m.tile = fourteen_tile(element);
        partial_bytes = 2LL * m.tile * FourteenPositions * element;
        backward_bytes =
            2LL * FourteenStep * FourteenPositions * element + 4 * (3 * cells + FourteenPositions + 14 * 10);
    }

    // `channels`: of a row.
    void split_seven(ConsensusMapArguments &m, int channels) {
        const int tile = SevenForwardRows * channels, most = (m.d + tile - 1) / tile, parts = most < 4 ? most : 4;
        m.chunk = ((m.d + parts - 1) / parts + 7) / 8 * 8;
        m.tile = tile;
        const long long row = 4 * SevenPositions, spread = 4 * seven_pitch(channels);
        partial_bytes = 2 * SevenForwardRows * row;
        backward_bytes =
            2 * SevenBackwardRows * (row + spread) + 4 * (2 * SevenGap + 3 * cells + SevenPositions + 7 * 3);
    }
};

} // namespace
} // namespace m3em
