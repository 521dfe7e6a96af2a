// What the kernels ask of the hardware, one small function each.
//
// No CUDA header is included: NVRTC's wheel brings none.  tests/emulator/primitives.cuh has the same
// functions for a CPU, so that the kernels can be checked where there is no GPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define SS_DEVICE __device__ __forceinline__
#define SS_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// Dynamic shared memory as 16-byte vectors.
// The next kernel of the stream may be set up while this one runs, if it was launched so; it waits by
// itself for what this one writes.
SS_DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
#define SS_STAGE(name) extern __shared__ uint4 name[]

// 16 bytes that are read once: not kept in L1.
SS_DEVICE uint4 load16_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

SS_DEVICE uint2 load8_once(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(address));
  return v;
}

// Shared memory by its 32-bit address, which stays in a register.
SS_DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
SS_DEVICE u32 shared_load4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
SS_DEVICE uint4 shared_load16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
SS_DEVICE void shared_store4(u32 address, u32 a) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(address), "r"(a) : "memory");
}
SS_DEVICE void shared_store8(u32 address, u32 a, u32 b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" : : "r"(address), "r"(a), "r"(b) : "memory");
}
SS_DEVICE void shared_store16(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

SS_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
SS_DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

// IEEE single precision, one rounding each, never contracted.
SS_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
SS_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
SS_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
SS_DEVICE float smaller(float a, float b) { return fminf(a, b); }
SS_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
SS_DEVICE float from_int(int v) { return __int2float_rn(v); }

// The same value, of which the compiler knows nothing: what is computed from it stays where it is
// written instead of occupying registers around a loop.
SS_DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Bytes of (low, high) picked by the nibbles of `selector`.
SS_DEVICE u32 pick(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

// max(|a|, |b|) of packed 16-bit floats and of singles; a NaN wins.  The sign bits of the result mean
// nothing.
#if __CUDA_ARCH__ >= 860
SS_DEVICE u32 max_magnitude_f16x2(u32 a, u32 b) {
  u32 d;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
SS_DEVICE u32 max_magnitude_bf16x2(u32 a, u32 b) {
  u32 d;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
#else
SS_DEVICE u32 max_magnitude_f16x2(u32 a, u32 b) {
  u32 d;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a & 0x7fff7fffu), "r"(b & 0x7fff7fffu));
  return d;
}
SS_DEVICE u32 max_magnitude_bf16x2(u32 a, u32 b) {
  u32 d;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a & 0x7fff7fffu), "r"(b & 0x7fff7fffu));
  return d;
}
#endif
SS_DEVICE u32 max_magnitude_f32(u32 a, u32 b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;"
      : "=f"(d)
      : "f"(as_float(a & 0x7fffffffu)), "f"(as_float(b & 0x7fffffffu)));
  return as_bits(d);
}
// Largest of a warp's 32 values.
SS_DEVICE u32 warp_max(u32 v) { return __reduce_max_sync(0xffffffffu, v); }
// Their sum, modulo 2^32.
SS_DEVICE u32 warp_sum(u32 v) { return __reduce_add_sync(0xffffffffu, v); }

SS_DEVICE void atomic_add(u64* address, u64 v) { atomicAdd(address, v); }
SS_DEVICE void atomic_largest(u64* address, u64 v) { atomicMax(address, v); }

// IEEE half, in the low 16 bits, to single: exact.
SS_DEVICE float from_f16(u32 bits) {
  float f;
  asm("{ .reg .b16 h, g;\n  mov.b32 {h, g}, %1;\n  cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(bits));
  return f;
}
// Two singles to packed 16-bit floats, `low` in the low half; nearest even, overflow to infinity.
SS_DEVICE u32 to_f16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
SS_DEVICE u32 to_bf16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

#if __CUDA_ARCH__ >= 890
#define SS_HAS_E4M3 1
// Two singles to packed E4M3, `low` in bits 0-7; nearest even, magnitudes limited to 448.
SS_DEVICE u32 to_e4m3x2_hardware(float low, float high) {
  u16 d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
#else
#define SS_HAS_E4M3 0
#endif
