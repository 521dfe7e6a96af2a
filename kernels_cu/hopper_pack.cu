// Brings a 2:4 sparse matrix into the order in which hopper_gemm.cu reads it.
//
// The order is described in hopper_gemm.cu and docs/hopper-kernel.md;
// slidesparse_rt/kernels/hopper_layout.py has it in NumPy, with the inverse.
//
// A thread makes its own part of one unit: 2 x 16 bytes of values and its words of metadata.  Metadata
// describes a window of four by a nibble: the index of the first kept element in the low two bits, of
// the second in the high two, in ascending order.  A window with fewer than two nonzeros keeps zeros.
//
// Compile-time settings: SS_TYPE int8, E4M3, bfloat16 or float16 (numbers.cuh)
#include "numbers.cuh"

constexpr bool WIDE = bytes_of(SS_TYPE) == 2;
constexpr int HALF_BYTES = 128 * 16;
constexpr int UNIT = 2 * HALF_BYTES + 128 * (WIDE ? 4 : 8);
constexpr u32 ELEMENT = WIDE ? 0xffffu : 0xffu;
constexpr u32 ELEMENT_BITS = WIDE ? 16 : 8;
// Of floats, -0 counts as zero; of integers, all bits do.
constexpr u32 NONZERO = SS_TYPE == SS_S8 ? 0xffu : WIDE ? 0x7fffu : 0x7fu;

struct Kept {
  u32 first, second;  // the elements' bits
  u32 indices;        // the nibble
};

// `window` holds four elements, the first in the lowest bits.
SS_DEVICE Kept keep_two(u64 window) {
  int found = 0, first = 0, second = 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (static_cast<u32>(window >> (i * ELEMENT_BITS)) & NONZERO) {
      if (found == 0) first = i;
      if (found == 1) second = i;
      ++found;
    }
  }
  if (found < 2 && first == 3) first = 0;
  return Kept{static_cast<u32>(window >> (first * ELEMENT_BITS)) & ELEMENT,
              static_cast<u32>(window >> (second * ELEMENT_BITS)) & ELEMENT,
              static_cast<u32>(first | second << 2)};
}

// Eight bytes of a row (two windows of 8-bit elements, one of 16-bit ones) to four.
SS_DEVICE u32 kept_word(const u8* bytes) {
  const u64 all = *reinterpret_cast<const u64*>(bytes);
  if constexpr (WIDE) {
    const Kept kept = keep_two(all);
    return kept.first | kept.second << 16;
  } else {
    const Kept low = keep_two(all & 0xffffffffu), high = keep_two(all >> 32);
    return low.first | low.second << 8 | high.first << 16 | high.second << 24;
  }
}

// The nibbles of eight windows.
SS_DEVICE u32 kept_indices(const u8* bytes) {
  u32 word = 0;
  for (int window = 0; window < 8; ++window) {
    const u64 all = WIDE ? *reinterpret_cast<const u64*>(bytes + 8 * window)
                         : *reinterpret_cast<const u32*>(bytes + 4 * window);
    word |= keep_two(all).indices << (4 * window);
  }
  return word;
}

// slid (128 * panels, pitch bytes), pitch 128 * stages and 8-byte aligned; units = panels * stages * 2;
// out (units, UNIT bytes), 16-byte aligned.  Blocks of 128 threads.
SS_KERNEL(128, 1)
hopper_pack(const u8* slid, i64 pitch, u8* out, i64 units, int stages) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, q = lane & 3;
  for (i64 unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int m = static_cast<int>(unit & 1);
    const i64 panel = (unit >> 1) / stages;
    const int stage = static_cast<int>((unit >> 1) - panel * stages);
    const i64 row = panel * 128 + 32 * warp + 4 * g + 2 * m;
    const u8* const start = slid + row * pitch + stage * static_cast<i64>(128);
    u8* const target = out + unit * UNIT;
#if SS_SOURCE == 2
    // Row r of the product, half a stage: 32 bytes, in two chunks of 16 that are swizzled.
    const int r = thread >> 1, half = thread & 1;
    const i64 mine_row = panel * 128 + 32 * (r >> 4) + 4 * (r & 7) + 2 * m + (r >> 3 & 1);
    const u8* const source = slid + mine_row * pitch + stage * static_cast<i64>(128) + 64 * half;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int chunk = (2 * half + c) ^ (r >> 1 & 3);
      const u8* const at = source + 32 * c;
      *reinterpret_cast<uint4*>(target + r * 64 + chunk * 16) =
          make_uint4(kept_word(at), kept_word(at + 8), kept_word(at + 16), kept_word(at + 24));
    }
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u8* const upper = start + 64 * half + 8 * q;
      const u8* const lower = upper + pitch;
      *reinterpret_cast<uint4*>(target + half * HALF_BYTES + thread * 16) =
          make_uint4(kept_word(upper), kept_word(lower), kept_word(upper + 32), kept_word(lower + 32));
    }
#endif
    // Metadata of row h = thread % 2 of the pair, of the half of the columns that bit 1 names.
    const u8* const mine = start + (thread & 1) * pitch;
    const int part = thread >> 1 & 1;
    u32* const words = reinterpret_cast<u32*>(target + 2 * HALF_BYTES);
    if constexpr (WIDE) {
      words[thread] = kept_indices(mine + 64 * part);
    } else {
      words[thread] = kept_indices(mine + 32 * part);
      words[128 + thread] = kept_indices(mine + 64 + 32 * part);
    }
  }
}
