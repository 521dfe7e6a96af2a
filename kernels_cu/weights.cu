// Preparing weights on the GPU: check, prune, slide, unslide.  A thread has one group of a row.  This
// happens once for a weight, and a group is read from memory once (its lines stay in L1), so the
// kernels are kept simple.  Quantizing is quantize_lift.cu with SS_WEIGHT.
//
// The definitions are slidesparse_rt/packing/_kernels.py; the results are the same to the bit.
//
// Findings (six 64-bit words, set to zero before):
//   0  groups that do not fit             1  nonzeros
//   2  elements that are not finite       3  the first group that does not fit: ~(index * 64 + found)
//   4  the first such element: ~index     5  unused
// An index is row * groups + group, or row * columns + column; 0 means that there is none.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_TYPE                           format of the weight (numbers.cuh)
//   SS_GROUP, SS_KEEP, SS_WINDOWS     the pattern
#include "numbers.cuh"

constexpr int SIZE = bytes_of(SS_TYPE);
constexpr u32 MAGNITUDE = SS_TYPE == SS_F32    ? 0x7fffffffu
                          : SS_TYPE == SS_S8   ? 0xffu
                          : SS_TYPE == SS_E4M3 ? 0x7fu
                                               : 0x7fffu;
// Magnitudes from here on are infinities and NaNs.
constexpr u32 NOT_FINITE = SS_TYPE == SS_F32     ? F32_INFINITY
                           : SS_TYPE == SS_S8    ? 0x100u
                           : SS_TYPE == SS_E4M3  ? 0x7fu
                           : SS_TYPE == SS_F16   ? 0x7c00u
                                                 : 0x7f80u;

SS_DEVICE u32 get(const u8* row, int i) {
  if constexpr (SIZE == 4) return reinterpret_cast<const u32*>(row)[i];
  if constexpr (SIZE == 2) return reinterpret_cast<const u16*>(row)[i];
  return row[i];
}

SS_DEVICE void put(u8* row, int i, u32 bits) {
  if constexpr (SIZE == 4) {
    reinterpret_cast<u32*>(row)[i] = bits;
  } else if constexpr (SIZE == 2) {
    reinterpret_cast<u16*>(row)[i] = static_cast<u16>(bits);
  } else {
    row[i] = static_cast<u8>(bits);
  }
}

// A finite or other number of the weight's format, exactly.
SS_DEVICE double magnitude_of(u32 bits) {
  bits &= MAGNITUDE;
  if constexpr (SS_TYPE == SS_F32) return as_float(bits);
  return unpack<SS_TYPE == SS_F16 ? SS_F16 : SS_BF16>(bits, 0);
}

SS_DEVICE int groups_of(int columns) { return (columns + SS_GROUP - 1) / SS_GROUP; }
SS_DEVICE int size_of_group(int group, int columns) {
  const int left = columns - group * SS_GROUP;
  return left < SS_GROUP ? left : SS_GROUP;
}
SS_DEVICE void report_group(u64* findings, int row, int group, int columns, int found) {
  const u64 index = static_cast<u64>(row) * groups_of(columns) + group;
  atomic_add(findings, 1);
  atomic_largest(findings + 3, ~(index * 64 + found));
}

// w (rows, columns), `stride` bytes from row to row; adds to the findings.
SS_KERNEL(256, 1) check(const u8* w, i64 stride, int rows, int columns, u64* findings) {
  u32 nonzeros = 0;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const u8* const source = w + row * stride;
    for (int group = threadIdx.x; group < groups_of(columns); group += blockDim.x) {
      int found = 0;
      for (int i = 0; i < size_of_group(group, columns); ++i) {
        const u32 magnitude = get(source, group * SS_GROUP + i) & MAGNITUDE;
        found += magnitude != 0;
        if (magnitude >= NOT_FINITE) {
          atomic_add(findings + 2, 1);
          atomic_largest(findings + 4, ~(static_cast<u64>(row) * columns + group * SS_GROUP + i));
        }
      }
      nonzeros += found;
      if (found > SS_KEEP) report_group(findings, row, group, columns, found);
    }
    const u32 of_warp = warp_sum(nonzeros);
    if ((threadIdx.x & 31) == 0 && of_warp) atomic_add(findings + 1, of_warp);
    nonzeros = 0;
  }
}

#if SS_TYPE == SS_F32 || SS_TYPE == SS_F16 || SS_TYPE == SS_BF16
// The two least important of a group, the least first; among equals the higher index goes first.
template <typename Score>
struct Least {
  Score first, second;
  int at_first = -1, at_second = -1;

  SS_DEVICE void see(Score score, int i) {
    if (at_first < 0 || score <= first) {
      second = first, at_second = at_first;
      first = score, at_first = i;
    } else if (at_second < 0 || score <= second) {
      second = score, at_second = i;
    }
  }
};

SS_DEVICE void copy_without(u8* out, const u8* source, int base, int size, int at_first, int at_second) {
  // A short last group is padded with zeros at its end, and those go first.
  const int drop = size - SS_KEEP;
  for (int i = 0; i < size; ++i) {
    const u32 bits = get(source, base + i);
    const bool dropped = (drop >= 1 && i == at_first) || (drop >= 2 && i == at_second);
    put(out, base + i, dropped || (bits & MAGNITUDE) == 0 ? 0 : bits);
  }
}

// Keep the largest magnitudes.  w and out (rows, columns), strides in bytes; they may be the same.
SS_KERNEL(256, 1)
prune_magnitude(const u8* w, i64 stride, u8* out, i64 out_stride, int rows, int columns) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const u8* const source = w + row * stride;
    for (int group = threadIdx.x; group < groups_of(columns); group += blockDim.x) {
      const int base = group * SS_GROUP, size = size_of_group(group, columns);
      Least<u32> least = {};
      for (int i = 0; i < size; ++i) least.see(get(source, base + i) & MAGNITUDE, i);
      copy_without(out + row * out_stride, source, base, size, least.at_first, least.at_second);
    }
  }
}

// Keep the largest |w| * norms[column], multiplied in double precision.
SS_KERNEL(256, 1)
prune_wanda(const u8* w, i64 stride, u8* out, i64 out_stride, const double* norms, int rows, int columns) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const u8* const source = w + row * stride;
    for (int group = threadIdx.x; group < groups_of(columns); group += blockDim.x) {
      const int base = group * SS_GROUP, size = size_of_group(group, columns);
      Least<double> least = {};
      for (int i = 0; i < size; ++i) {
        least.see(magnitude_of(get(source, base + i)) * norms[base + i], i);
      }
      copy_without(out + row * out_stride, source, base, size, least.at_first, least.at_second);
    }
  }
}
#endif

#if SS_TYPE != SS_F32
constexpr int PAIRS = SS_GROUP / 2;
using Window = u64;

SS_DEVICE void store_window(u8* at, Window window) {
  if constexpr (SIZE == 1) {
    *reinterpret_cast<u32*>(at) = static_cast<u32>(window);
  } else {
    *reinterpret_cast<u64*>(at) = window;
  }
}

SS_DEVICE Window load_window(const u8* at) {
  if constexpr (SIZE == 1) return *reinterpret_cast<const u32*>(at);
  return *reinterpret_cast<const u64*>(at);
}

// Each nonzero goes to the earliest window that covers it and has room.  q (rows, columns), `stride`
// bytes from row to row; out (padded_rows, pitch bytes), 8-byte aligned: zeros beyond K' and from
// `rows` on.  Groups that do not fit are reported and lose what does not fit.
SS_KERNEL(256, 1)
slide(const u8* q, i64 stride, u8* out, i64 pitch, int rows, int padded_rows, int columns, u64* findings) {
  for (int row = blockIdx.x; row < padded_rows; row += gridDim.x) {
    u8* const target = out + row * pitch;
    const int groups = row < rows ? groups_of(columns) : 0;
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
      const u8* const source = q + row * stride;
      const int base = group * SS_GROUP, size = size_of_group(group, columns);
      u8* at = target + static_cast<i64>(group) * (SS_WINDOWS * 4 * SIZE);
      // The window before the current pair (its slots 2 and 3 cover the pair) and the one that the
      // pair opens; before the first pair and after the last window there is no room.
      Window before = 0, opened = 0;
      int room_before = 0, room_opened = 0, nonzeros = 0;
      bool fits = true;
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        opened = 0, room_opened = pair < SS_WINDOWS ? 2 : 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = 2 * pair + j;
          const u32 bits = i < size ? get(source, base + i) : 0;
          if ((bits & MAGNITUDE) == 0) continue;
          ++nonzeros;
          if (room_before) {
            before |= static_cast<Window>(bits) << ((2 + j) * 8 * SIZE), --room_before;
          } else if (room_opened) {
            opened |= static_cast<Window>(bits) << (j * 8 * SIZE), --room_opened;
          } else {
            fits = false;
          }
        }
        if (pair > 0) store_window(at, before), at += 4 * SIZE;
        before = opened, room_before = room_opened;
      }
      if (PAIRS == SS_WINDOWS) store_window(at, before);  // "dense"
      if (!fits) report_group(findings, row, group, columns, nonzeros);
    }
    const i64 used = static_cast<i64>(groups) * (SS_WINDOWS * 4 * SIZE);
    for (i64 at = used + 4 * threadIdx.x; at < pitch; at += 4 * blockDim.x) {
      *reinterpret_cast<u32*>(target + at) = 0;
    }
  }
}

// The inverse.  slid (rows, pitch bytes), out (rows, columns) with `stride` bytes from row to row.
// Groups that cannot come from sliding are reported.
SS_KERNEL(256, 1)
unslide(const u8* slid, i64 pitch, u8* out, i64 stride, int rows, int columns, u64* findings) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int group = threadIdx.x; group < groups_of(columns); group += blockDim.x) {
      const int base = group * SS_GROUP, size = size_of_group(group, columns);
      const u8* const at = slid + row * pitch + static_cast<i64>(group) * (SS_WINDOWS * 4 * SIZE);
      Window before = 0;
      int nonzeros = 0;
      bool sound = true;
#pragma unroll
      for (int pair = 0; pair <= PAIRS; ++pair) {
        const Window opened = pair < SS_WINDOWS ? load_window(at + pair * 4 * SIZE) : 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = 2 * pair + j;
          constexpr u64 ELEMENT = SIZE == 1 ? 0xffu : 0xffffu;
          u32 a = static_cast<u32>(before >> ((2 + j) * 8 * SIZE) & ELEMENT);
          u32 b = static_cast<u32>(opened >> (j * 8 * SIZE) & ELEMENT);
          a = a & MAGNITUDE ? a : 0, b = b & MAGNITUDE ? b : 0;
          nonzeros += (a != 0) + (b != 0);
          if (i < size) {
            put(out + row * stride, base + i, a | b);
            sound = sound && !(a && b);
          } else {
            sound = sound && !a && !b;
          }
        }
        before = opened;
      }
      if (!sound) report_group(findings, row, group, columns, nonzeros);
    }
  }
}
#endif
