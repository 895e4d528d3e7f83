// In the place of CUDA's header: bfloat16, with the conversions that device code uses.
#pragma once

#include "simt/simt.h"

struct __nv_bfloat16 {
    unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return simt::float_of(unsigned(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = simt::bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return {0x7fff}; // as the card has it
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
