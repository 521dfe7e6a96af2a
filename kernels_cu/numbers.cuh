// Number formats and the arithmetic of quantization.  slidesparse_rt.packing.quantize is the
// definition; everything here gives the same bits.
#pragma once

#include "primitives.cuh"

// Values of SS_IN, SS_OUT, SS_ACC and SS_TYPE; catalog.py has the same numbers.
#define SS_F32 0
#define SS_F16 1
#define SS_BF16 2
#define SS_S8 3
#define SS_E4M3 4
#define SS_S32 5

constexpr u32 F32_NAN = 0x7fc00000u;
constexpr u32 F32_INFINITY = 0x7f800000u;
// The smallest scale, 2^-126.
constexpr float SCALE_FLOOR = 1.17549435082228751e-38f;

SS_DEVICE constexpr int bytes_of(int type) {
  return type == SS_F32 || type == SS_S32 ? 4 : type == SS_S8 || type == SS_E4M3 ? 1 : 2;
}
SS_DEVICE constexpr bool is_wide_format(int type) { return type == SS_F16 || type == SS_BF16; }
// Largest magnitude that the quantizer emits.
SS_DEVICE constexpr float q_max_of(int type) { return type == SS_S8 ? 127.0f : 448.0f; }

// Element `j` (0 or 1) of a packed pair.
template <int TYPE>
SS_DEVICE float unpack(u32 pair, int j) {
  if (TYPE == SS_BF16) return as_float(j ? pair & 0xffff0000u : pair << 16);
  return from_f16(j ? pair >> 16 : pair);
}

template <int TYPE>
SS_DEVICE u32 pack16(float low, float high) {
  return TYPE == SS_BF16 ? to_bf16x2(low, high) : to_f16x2(low, high);
}

// max(|a|, |b|) of the elements in one register.
template <int TYPE>
SS_DEVICE u32 max_magnitude(u32 a, u32 b) {
  if (TYPE == SS_F32) return max_magnitude_f32(a, b);
  if (TYPE == SS_BF16) return max_magnitude_bf16x2(a, b);
  return max_magnitude_f16x2(a, b);
}

// The larger element of a register of magnitudes, as ordered bits.
template <int TYPE>
SS_DEVICE u32 fold_magnitude(u32 v) {
  v &= TYPE == SS_F32 ? 0x7fffffffu : 0x7fff7fffu;
  if (TYPE == SS_F32) return v;
  const u32 low = v & 0xffffu, high = v >> 16;
  return low > high ? low : high;
}

// Magnitude bits at or above this are infinities and NaNs.
SS_DEVICE constexpr u32 infinity_of(int type) {
  return type == SS_F32 ? F32_INFINITY : type == SS_F16 ? 0x7c00u : 0x7f80u;
}

template <int TYPE>
SS_DEVICE float magnitude_value(u32 bits) {
  if (TYPE == SS_F32) return as_float(bits);
  if (TYPE == SS_BF16) return as_float(bits << 16);
  return from_f16(bits);
}

// E4M3 in integer arithmetic, for GPUs without the instruction.
SS_DEVICE u32 to_e4m3_software(float value) {
  const u32 bits = as_bits(value);
  const float magnitude = smaller(as_float(bits & 0x7fffffffu), 448.0f);
  // Below 2^-6 numbers are 2^-9 apart, which is the spacing of singles at 2^14.
  const u32 small = as_bits(add(magnitude, 16384.0f)) - 0x46800000u;
  // Else 3 of 23 mantissa bits stay, ties to even; exponent bias 7 instead of 127.
  const u32 wide = as_bits(magnitude);
  const u32 normal = ((wide + 0x7ffffu + ((wide >> 20) & 1u)) >> 20) - (120u << 3);
  return ((bits >> 24) & 0x80u) | (magnitude < 0.015625f ? small : normal);
}

SS_DEVICE u32 to_e4m3x2(float low, float high) {
#if SS_HAS_E4M3
  return to_e4m3x2_hardware(low, high);
#else
  return to_e4m3_software(low) | (to_e4m3_software(high) << 8);
#endif
}

// Four quotients to four bytes, the first in bits 0-7.  LIMIT: they may exceed +-127.
template <int TYPE, bool LIMIT>
SS_DEVICE u32 quantize4(float a, float b, float c, float d) {
  if (TYPE == SS_E4M3) {
    return pick(to_e4m3x2(a, b), to_e4m3x2(c, d), 0x5410);
  }
  if (LIMIT) {
    a = larger(smaller(a, 127.0f), -127.0f);
    b = larger(smaller(b, 127.0f), -127.0f);
    c = larger(smaller(c, 127.0f), -127.0f);
    d = larger(smaller(d, 127.0f), -127.0f);
  }
  // At 1.5 * 2^23 singles are 1 apart and even ones have even bits: the sum rounds half to even, and
  // its low byte is the two's complement integer.
  constexpr float MAGIC = 12582912.0f;
  const u32 ab = pick(as_bits(add(a, MAGIC)), as_bits(add(b, MAGIC)), 0x0040);
  const u32 cd = pick(as_bits(add(c, MAGIC)), as_bits(add(d, MAGIC)), 0x0040);
  return pick(ab, cd, 0x5410);
}

// Packed floats of 8 or 16 bits with -0 turned into +0.
template <int TYPE>
SS_DEVICE u32 positive_zeros(u32 v) {
  constexpr u32 MAGNITUDES = bytes_of(TYPE) == 1 ? 0x7f7f7f7fu : 0x7fff7fffu;
  // The sum carries into the sign's place unless the magnitude is zero.
  return v & (((v & MAGNITUDES) + MAGNITUDES) | MAGNITUDES);
}
