// In the place of CUDA's header: the half type, with the conversions that device code uses.
#pragma once

#include "simt/simt.h"

struct __half {
    unsigned short bits;
};

inline float __half2float(__half x) {
    const unsigned sign = unsigned(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00)
        return simt::float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Two exact multiplications bring the exponent into place, subnormal numbers included.
    return simt::float_of(sign | simt::bits_of(simt::float_of(rest << 13) * simt::float_of(0x77800000)));
}

inline __half __float2half_rn(float x) {
    const unsigned bits = simt::bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    unsigned made;
    if (rest > 0x7f800000)
        made = 0x7fff; // as the card has it
    else if (rest >= 0x47800000)
        made = 0x7c00;
    else if (rest < 0x38800000) // below the smallest normal half: one rounding, done by the addition
        made = simt::bits_of(simt::float_of(rest) + 0.5f) - 0x3f000000;
    else
        made = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
    return {static_cast<unsigned short>(sign | made)};
}
