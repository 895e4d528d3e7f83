// Features that a store keeps as uint8 with a step for every channel, made float16 again.
#include "cpu/tile.h"

namespace m3em {
namespace M3EM_ISA {

void uint8_features(const Uint8Features &o) {
    constexpr int64_t block = 2048; // floats: they stay in the first-level cache
    constexpr int64_t wide = 16;
    float room[block + wide];
    const int64_t total = o.channels * o.positions, end = o.frames * total;
    for (int64_t frame = 0; frame < o.frames; ++frame) {
        for (int64_t start = 0; start < total; start += block) {
            const int64_t count = total - start < block ? total - start : block, at = frame * total + start;
            const uint8_t *from = o.from + at;
            int64_t c = start / o.positions, q = start % o.positions;
            for (int64_t done = 0; done < count; ++c, q = 0) {
                const int64_t run = o.positions - q < count - done ? o.positions - q : count - done;
                const float step = o.steps[c];
                int64_t i = 0;
                // Whole vectors, past the end of the row too: the next row writes over what is too much.
                if (at + done + run + wide <= end)
                    for (; i < run; i += wide)
                        for (int64_t k = 0; k < wide; ++k)
                            room[done + i + k] = float(from[done + i + k]) * step;
                for (; i < run; ++i)
                    room[done + i] = float(from[done + i]) * step;
                done += run;
            }
            narrow_row(room, static_cast<f16 *>(o.to) + at, count);
        }
    }
}

} // namespace M3EM_ISA
} // namespace m3em
