// Sliding windows: which inputs a window repeats, and how four bytes at any even offset are picked
// out of shared memory.  slidesparse_rt.pattern has the geometry.
#pragma once

#include "primitives.cuh"

// Geometry of a pattern: GROUP inputs become WINDOWS windows of four; window w starts at input 2w.
template <int GROUP, int WINDOWS>
struct Lift {
  static constexpr bool IDENTITY = GROUP == 4 && WINDOWS == 1;
  // Inputs that are skipped between the last window of a group and the first of the next, beyond
  // the stride of two: 2, or 0 for "dense" (GROUP 2, WINDOWS 1), whose windows run on.
  static constexpr u32 SKIP = GROUP - 2 * WINDOWS;

  // Sixteen bytes of 8-bit slots: windows first .. first+3, `first` a multiple of 4.  `stage` is the
  // address of the row's input 0; up to 8 bytes beyond the last input of these windows are read.
  static SS_DEVICE uint4 chunk8(u32 stage, u32 first) {
    if constexpr (IDENTITY) return shared_load16(stage + 4 * first);
    const u32 group = first / WINDOWS, window = first - group * WINDOWS;
    const u32 start = 2 * first + SKIP * group;
    const u32 words = stage + (start & ~3u);
    const u32 w0 = shared_load4(words), w1 = shared_load4(words + 4);
    const u32 w2 = shared_load4(words + 8), w3 = shared_load4(words + 12);
    // Bytes start .. start+11; `start` is even.
    const u32 shift = 0x3210u + (start & 2u) * 0x1111u;
    const u32 y0 = pick(w0, w1, shift), y1 = pick(w1, w2, shift), y2 = pick(w2, w3, shift);
    // From the window that opens a new group on, two more bytes are skipped; four consecutive
    // windows open at most one group after the first window (two windows a group: first is even).
    const u32 skip1 = SKIP && window + 1 >= WINDOWS ? 0x2222u : 0;
    const u32 skip2 = SKIP && window + 2 >= WINDOWS ? 0x2222u : 0;
    const u32 skip3 = SKIP && window + 3 >= WINDOWS ? 0x2222u : 0;
    return make_uint4(y0, pick(y0, y1, 0x5432u + skip1), pick(y1, y2, 0x3210u + skip2),
                      pick(y1, y2, 0x5432u + skip3));
  }

  // Sixteen bytes of 16-bit slots: windows first and first+1, `first` even.
  static SS_DEVICE uint4 chunk16(u32 stage, u32 first) {
    if constexpr (IDENTITY) return shared_load16(stage + 8 * first);
    const u32 group = first / WINDOWS, window = first - group * WINDOWS;
    const u32 start = first + (SKIP / 2) * group;
    const u32 words = stage + 4 * start;
    const u32 other = SKIP && window + 1 >= WINDOWS ? words + 8 : words + 4;
    return make_uint4(shared_load4(words), shared_load4(words + 4), shared_load4(other),
                      shared_load4(other + 4));
  }
};
