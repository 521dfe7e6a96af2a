// Brings a 2:4 sparse matrix into the order in which hopper_gemm.cu reads it.
//
// The order is described in hopper_gemm.cu and docs/hopper-kernel.md;
// slidesparse_rt/kernels/hopper_layout.py has it in NumPy, with the inverse.
//
// A unit is 64 rows by one stage (128 bytes of K'): the kept elements, 64 bytes a row in four chunks of 16,
// chunk c of row r stored as chunk c ^ (r / 2 % 4) (the tensor cores' 64-byte swizzle); then metadata.
//
// Metadata describes a window of four by a nibble: the index of the first kept element in the low two
// bits, of the second in the high two, in ascending order.  A window with fewer than two nonzeros keeps
// zeros.  Which nibbles a thread of a warpgroup brings to a product, with g = lane / 4:
//   8-bit: of row g + 8 * (lane % 2), eight windows, from window 8 * (lane / 2 % 2) of its 64 bytes on;
//   16-bit: a pair of lanes serves one product, (lane / 2 % 2) of the stage: four windows, from window 4 *
//   (lane % 2) on, of row g in the low half of the word, of row g + 8 in the high half.
// (PTX ISA has these as figures; benchmarks/results/hopper-metadata-h100.txt found the 16-bit ones.)
//
// Compile-time settings: SS_TYPE int8, E4M3, bfloat16 or float16 (numbers.cuh)
#include "numbers.cuh"

constexpr bool WIDE = bytes_of(SS_TYPE) == 2;
constexpr int VALUE_BYTES = 64 * 64;
constexpr int UNIT = VALUE_BYTES + 128 * (WIDE ? 4 : 8);
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

// The nibbles of COUNT windows.
template <int COUNT>
SS_DEVICE u32 kept_indices(const u8* bytes) {
  u32 word = 0;
#pragma unroll
  for (int window = 0; window < COUNT; ++window) {
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
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2;
  // Values: this thread has half of row r of the product.
  const int r = thread >> 1, half = thread & 1;
  const int value_row = 32 * (r >> 4) + 4 * (r & 7) + (r >> 3 & 1);
  for (i64 unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int m = static_cast<int>(unit & 1);
    const i64 panel = (unit >> 1) / stages;
    const int stage = static_cast<int>((unit >> 1) - panel * stages);
    // Row 0 of block m of the panel, at this stage.
    const u8* const start = slid + (panel * 128 + 2 * m) * pitch + stage * static_cast<i64>(128);
    u8* const target = out + unit * UNIT;
    const u8* const source = start + value_row * pitch + 64 * half;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int chunk = (2 * half + c) ^ (r >> 1 & 3);
      const u8* const at = source + 32 * c;
      *reinterpret_cast<uint4*>(target + r * 64 + chunk * 16) =
          make_uint4(kept_word(at), kept_word(at + 8), kept_word(at + 16), kept_word(at + 24));
    }
    const u8* const row = start + (32 * warp + 4 * g) * pitch;  // row g; row g + 8 is the next
    u32* const words = reinterpret_cast<u32*>(target + VALUE_BYTES);
    const int low = lane & 1, high = lane >> 1 & 1;
    if constexpr (WIDE) {
      const u8* const at = row + 64 * high + 32 * low;
      words[thread] = kept_indices<4>(at) | kept_indices<4>(at + pitch) << 16;
    } else {
      const u8* const at = row + low * pitch + 32 * high;
      words[thread] = kept_indices<8>(at);
      words[128 + thread] = kept_indices<8>(at + 64);
    }
  }
}
