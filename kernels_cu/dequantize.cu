// Dequantize: y = cast((single(acc) * s_m) * s_n + bias), each step rounded once, no fused multiply-add.
//
// A thread has SS_COLUMNS consecutive columns of SS_ROWS rows, so that channel scales and bias are
// read once for all its rows; loads of a batch of rows are issued before the first is used.
//
// A factor or bias that is not given is skipped: times 1 and plus -0 leave every number as it is.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_ACC       float32, int32 or bfloat16; SS_OUT float32, float16 or bfloat16 (numbers.cuh)
//   SS_COLUMNS   4 or 8;  SS_ROWS rows of a thread, a multiple of SS_BATCH
//   SS_ALIGNED   1: rows of acc and out start at multiples of SS_COLUMNS elements (16 bytes at most)
#include "numbers.cuh"

constexpr int ACC_BYTES = SS_COLUMNS * bytes_of(SS_ACC);
constexpr int OUT_BYTES = SS_COLUMNS * bytes_of(SS_OUT);
constexpr int ACC_WORDS = ACC_BYTES / 4;
constexpr int OUT_WORDS = OUT_BYTES / 4;

// Columns of one row as they lie in memory.
struct Held {
  u32 word[ACC_WORDS];
};

SS_DEVICE u32 load_element(const u8* row, i64 column) {
  if (bytes_of(SS_ACC) == 4) return reinterpret_cast<const u32*>(row)[column];
  return reinterpret_cast<const u16*>(row)[column];
}

SS_DEVICE void load_held(Held& held, const u8* row, i64 first, i64 columns) {
  if (SS_ALIGNED && first + SS_COLUMNS <= columns) {
    const u8* const address = row + first * bytes_of(SS_ACC);
    if (ACC_BYTES == 8) {
      const uint2 v = load8_once(address);
      held.word[0] = v.x, held.word[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < ACC_BYTES / 16; ++i) {
        const uint4 v = load16_once(address + 16 * i);
        held.word[(4 * i) % ACC_WORDS] = v.x, held.word[(4 * i + 1) % ACC_WORDS] = v.y;
        held.word[(4 * i + 2) % ACC_WORDS] = v.z, held.word[(4 * i + 3) % ACC_WORDS] = v.w;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < ACC_WORDS; ++i) held.word[i] = 0;
#pragma unroll
  for (int j = 0; j < SS_COLUMNS; ++j) {
    if (first + j < columns) {
      const int bit = j * 8 * bytes_of(SS_ACC);
      held.word[bit / 32] |= load_element(row, first + j) << (bit % 32);
    }
  }
}

SS_DEVICE float element(const Held& held, int j) {
  if (SS_ACC == SS_S32) return from_int(static_cast<int>(held.word[j % ACC_WORDS]));
  if (SS_ACC == SS_F32) return as_float(held.word[j % ACC_WORDS]);
  return unpack<SS_ACC == SS_F16 ? SS_F16 : SS_BF16>(held.word[j / 2 % ACC_WORDS], j & 1);
}

SS_DEVICE void store_out(u8* row, i64 first, i64 columns, const u32 (&word)[OUT_WORDS]) {
  u8* const address = row + first * bytes_of(SS_OUT);
  if (SS_ALIGNED && first + SS_COLUMNS <= columns) {
    if (OUT_BYTES == 8) {
      *reinterpret_cast<uint2*>(address) = make_uint2(word[0], word[1 % OUT_WORDS]);
    } else {
#pragma unroll
      for (int i = 0; i < OUT_BYTES / 16; ++i) {
        reinterpret_cast<uint4*>(address)[i] =
            make_uint4(word[4 * i], word[(4 * i + 1) % OUT_WORDS], word[(4 * i + 2) % OUT_WORDS],
                       word[(4 * i + 3) % OUT_WORDS]);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < SS_COLUMNS; ++j) {
    if (first + j < columns) {
      if (SS_OUT == SS_F32) {
        reinterpret_cast<u32*>(address)[j] = word[j % OUT_WORDS];
      } else {
        reinterpret_cast<u16*>(address)[j] = static_cast<u16>(word[j / 2] >> (16 * (j & 1)));
      }
    }
  }
}

// acc (rows, columns) and out (rows, columns) with strides in elements; token_scales (rows),
// channel_scales and bias (columns), each null if there is none.  Blocks: column_tiles for every
// SS_ROWS * blockDim.y rows, columns fastest.
SS_KERNEL(256, 1)
dequantize(const u8* acc, i64 acc_stride, u8* out, i64 out_stride, const float* token_scales,
           const float* channel_scales, const float* bias, i64 rows, i64 columns, int column_tiles) {
  const int row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x - row_tile * column_tiles;
  const i64 first = (static_cast<i64>(column_tile) * blockDim.x + threadIdx.x) * SS_COLUMNS;
  if (first >= columns) return;
  float channel[SS_COLUMNS], offset[SS_COLUMNS];
#pragma unroll
  for (int j = 0; j < SS_COLUMNS; ++j) {
    const bool inside = first + j < columns;
    channel[j] = channel_scales && inside ? channel_scales[first + j] : 1.0f;
    offset[j] = bias && inside ? bias[first + j] : -0.0f;
  }
  i64 row = static_cast<i64>(row_tile) * (SS_ROWS * blockDim.y) + threadIdx.y;
#pragma unroll 1
  for (int batch = 0; batch < SS_ROWS / SS_BATCH; ++batch) {
    Held held[SS_BATCH];
    float token[SS_BATCH];
#pragma unroll
    for (int b = 0; b < SS_BATCH; ++b) {
      const i64 at = row + b * static_cast<i64>(blockDim.y);
      token[b] = 1.0f;
      if (at < rows) {
        load_held(held[b], acc + at * acc_stride * bytes_of(SS_ACC), first, columns);
        if (token_scales) token[b] = token_scales[at];
      }
    }
#pragma unroll
    for (int b = 0; b < SS_BATCH; ++b) {
      const i64 at = row + b * static_cast<i64>(blockDim.y);
      if (at >= rows) return;
      u32 word[OUT_WORDS];
#pragma unroll
      for (int j = 0; j < SS_COLUMNS; j += 2) {
        const float low = add(mul(mul(element(held[b], j), token[b]), channel[j]), offset[j]);
        const float high = add(mul(mul(element(held[b], j + 1), token[b]), channel[j + 1]), offset[j + 1]);
        if (SS_OUT == SS_F32) {
          word[j % OUT_WORDS] = as_bits(low), word[(j + 1) % OUT_WORDS] = as_bits(high);
        } else {
          word[j / 2] = pack16<SS_OUT == SS_F16 ? SS_F16 : SS_BF16>(low, high);
        }
      }
      store_out(out + at * out_stride * bytes_of(SS_OUT), first, columns, word);
    }
    row += static_cast<i64>(SS_BATCH) * blockDim.y;
  }
}
