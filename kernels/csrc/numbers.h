// Number formats and functions as plain arithmetic, which compilers turn into vector instructions of any width.
#pragma once

#include <cstdint>
#include <cstring>

namespace engine {
namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A number's place in the order of all floats; as an involution also the bits of the number of a place.
inline int32_t place_of(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

// The bits of half-precision numbers, with a type for each format.
struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
    const uint32_t magnitude = uint32_t{value.bits & 0x7FFFu} << 13, sign = uint32_t{value.bits & 0x8000u} << 16;
    const uint32_t normal = magnitude + ((127u - 15u) << 23);
    const uint32_t infinite_or_nan = magnitude + ((255u - 31u) << 23);
    // A subnormal one is mantissa * 2^-24: made without a subnormal float, which is slow on some processors.
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t bits = magnitude < (1u << 23) ? subnormal : magnitude < (31u << 23) ? normal : infinite_or_nan;
    return float_of(bits | sign);
}

// Rounded to nearest, ties to even.
inline BFloat16 to_bfloat16(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
}

// e^x to about 1 ulp for x <= 0; 0 where the result would be subnormal; NaN for NaN.
inline float exponential(float x) {
    constexpr float LOWEST = -87.33f;  // above the logarithm of the smallest normal number
    constexpr float LOG2_E = 1.44269504f;
    constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // n * LN2_HIGH is exact
    constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    const float clamped = x < LOWEST ? LOWEST : x;
    const float shifted = clamped * LOG2_E + ROUNDER;
    const float n = shifted - ROUNDER;
    const float r = (clamped - n * LN2_HIGH) - n * LN2_LOW;  // |r| <= ln(2) / 2, and e^x = 2^n e^r
    float q = 1.381459878757596e-3f;  // minimax fit of (e^r - 1 - r) / r^2
    q = q * r + 8.368716575205326e-3f;
    q = q * r + 4.166838899254799e-2f;
    q = q * r + 0.1666652113199234f;
    q = q * r + 0.4999999403953552f;
    const float e_r = q * (r * r) + r + 1.0f;
    const float power = float_of((bits_of(shifted) + 127u) << 23);
    return x < LOWEST ? 0.0f : power * e_r;
}

}  // namespace
}  // namespace engine
