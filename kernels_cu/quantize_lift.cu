// Quantize and lift: rows of float32, float16 or bfloat16 become rows of int8 or E4M3 with one scale
// each, or (lift only) rows of a 16-bit float; every row is repeated into sliding windows.
//
// A row is read from memory once.  A thread holds SS_VECTORS pieces of 16 bytes of it in registers,
// `blockDim.x` pieces apart, so that loads are contiguous over a warp.  Then: the largest magnitude
// over the threads; each input quantized once into shared memory; from there 16 bytes of windows a
// thread.  While those are written, the loads of the block's next row are already under way.
//
// Per row, in this order (all single precision; slidesparse_rt/packing/quantize.py):
//   peak p == 0: scale 1, values +0; p not finite: scale NaN, values +0
//   p' = max(p, q_max * 2^-126); scale = p' / q_max; r = q_max / p'
//   value = round_half_even(x * r), limited to +-q_max
// With a given scale s (SS_STATIC): r = 1 / s and scale = s, unless the row is not finite or s is not
// in [2^-126, largest single]: then scale NaN, values +0.
// Lift only: elements are rounded to the 16-bit format first; a row that then holds a NaN or an
// infinity becomes NaN in all K' slots.
//
// Bytes beyond K' and rows from `rows` to `padded_rows` are zeros; `scales` has `rows` entries.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_IN, SS_OUT       formats (numbers.cuh)
//   SS_GROUP            inputs of a group (2 for "dense"), SS_WINDOWS its windows
//   SS_VECTORS          16-byte pieces that a thread holds
//   SS_STATIC           1: scales are given
//   SS_WEIGHT           1: -0 becomes +0
//   SS_ACCESS           bytes of one load: 16, 8, 4 or 2; divides the address of x, its row stride and
//                       its row length
//   SS_WARP_ROW         1: every warp has its own row; 0: the block shares one
//   SS_TILED            1: rows longer than the block holds; they are read twice, the second time
//                       mostly from L2
//   SS_MAX_THREADS      largest block; SS_MIN_BLOCKS how many of those a multiprocessor must hold
#include "numbers.cuh"
#include "windows.cuh"

constexpr bool QUANTIZED = !is_wide_format(SS_OUT);
constexpr bool CASTS = !QUANTIZED && SS_IN != SS_OUT;
constexpr int ELEMENTS = 16 / bytes_of(SS_IN);
// Magnitudes are compared in this format; `REGISTERS` of a piece hold such elements.
constexpr int SEEN = CASTS ? SS_OUT : SS_IN;
constexpr int REGISTERS = CASTS && SS_IN == SS_F32 ? 2 : 4;
constexpr int STAGE_BYTES = ELEMENTS * bytes_of(SS_OUT);
constexpr int CHUNK_WINDOWS = 4 / bytes_of(SS_OUT);
constexpr u32 NAN_PAIR = SS_OUT == SS_BF16 ? 0x7fc07fc0u : 0x7e007e00u;

using Windows = Lift<SS_GROUP, SS_WINDOWS>;
struct Piece {
  u32 word[4];
};

struct Verdict {
  float reciprocal;
  bool dead;
};

SS_DEVICE int thread_of_row() { return SS_WARP_ROW ? threadIdx.x & 31 : threadIdx.x; }
SS_DEVICE int threads_of_row() { return SS_WARP_ROW ? 32 : blockDim.x; }

// SS_ACCESS bytes from `source` into the piece, at its byte `at`.
SS_DEVICE void load_part(Piece& piece, int at, const u8* source) {
  if constexpr (SS_ACCESS == 16) {
    const uint4 v = load16_once(source);
    piece = Piece{{v.x, v.y, v.z, v.w}};
  } else if constexpr (SS_ACCESS == 8) {
    const uint2 v = load8_once(source);
    piece.word[at / 4] = v.x, piece.word[at / 4 + 1] = v.y;
  } else if constexpr (SS_ACCESS == 4) {
    piece.word[at / 4] = *reinterpret_cast<const u32*>(source);
  } else {
    piece.word[at / 4] |= static_cast<u32>(*reinterpret_cast<const u16*>(source)) << (at % 4 * 8);
  }
}

SS_DEVICE void sync_row() {
  if constexpr (SS_WARP_ROW) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// This thread's pieces of a row of `length` bytes, a multiple of SS_ACCESS.  `source` is where the
// thread's first piece lies.  Nothing here uses what was loaded, so no thread waits.
// Beyond the row's end: zeros, or (FULL) some other piece of the row, which changes no peak.
constexpr bool FULL = SS_ACCESS == 16 && !SS_TILED;

SS_DEVICE void load_row(Piece (&pieces)[SS_VECTORS], const u8* source, int length) {
  const int start = opaque(thread_of_row() * 16), step = threads_of_row() * 16;
#pragma unroll
  for (int v = 0; v < SS_VECTORS; ++v) {
    if constexpr (FULL) {
      const int last = length - 16 - start;
      load_part(pieces[v], 0, source + (v * step < last ? v * step : last));
    } else {
      pieces[v] = Piece{};
#pragma unroll
      for (int part = 0; part < 16; part += SS_ACCESS) {
        if (start + v * step + part < length) load_part(pieces[v], part, source + v * step + part);
      }
    }
  }
}

// Lift only: round to the output format, in place.
SS_DEVICE void cast_pieces(Piece (&pieces)[SS_VECTORS]) {
  if constexpr (CASTS) {
#pragma unroll
    for (int v = 0; v < SS_VECTORS; ++v) {
      u32* const word = pieces[v].word;
      if constexpr (SS_IN == SS_F32) {
        word[0] = pack16<SS_OUT>(as_float(word[0]), as_float(word[1]));
        word[1] = pack16<SS_OUT>(as_float(word[2]), as_float(word[3]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          word[i] = pack16<SS_OUT>(unpack<SS_IN>(word[i], 0), unpack<SS_IN>(word[i], 1));
        }
      }
    }
  }
}

SS_DEVICE u32 peak_of(const Piece (&pieces)[SS_VECTORS]) {
  u32 peak = 0;
#pragma unroll
  for (int v = 0; v < SS_VECTORS; ++v) {
    u32 of_piece = max_magnitude<SEEN>(pieces[v].word[0], pieces[v].word[1]);
#pragma unroll
    for (int i = 2; i < REGISTERS; ++i) of_piece = max_magnitude<SEEN>(of_piece, pieces[v].word[i]);
    peak = v ? max_magnitude<SEEN>(peak, of_piece) : of_piece;
  }
  return peak;
}

// The largest magnitude of the row in every thread.  Afterwards all threads are done with what they
// read from shared memory before.
SS_DEVICE u32 row_peak(u32 mine, u32* partial) {
  const u32 of_warp = warp_max(fold_magnitude<SEEN>(mine));
  if constexpr (SS_WARP_ROW) {
    __syncwarp();
    return of_warp;
  }
  const int lane = threadIdx.x & 31;
  if (lane == 0) partial[threadIdx.x >> 5] = of_warp;
  __syncthreads();
  return warp_max(lane < static_cast<int>(blockDim.x >> 5) ? partial[lane] : 0);
}

// What happens to a row of this peak; one thread writes its scale.
SS_DEVICE Verdict judge(u32 peak, int row, float* scales, const float* given, int given_step) {
  const bool finite = peak < infinity_of(SEEN);
  if constexpr (!QUANTIZED) return Verdict{0.0f, !finite};
  constexpr float Q_MAX = q_max_of(SS_OUT);
  Verdict verdict;
  float scale;
  if constexpr (SS_STATIC) {
    scale = given[static_cast<i64>(row) * given_step];
    const u32 bits = as_bits(scale);
    verdict.dead = !(finite && bits >= as_bits(SCALE_FLOOR) && bits < F32_INFINITY);
    if (verdict.dead) scale = as_float(F32_NAN);
    verdict.reciprocal = divide(1.0f, scale);
  } else {
    const float floored = larger(magnitude_value<SEEN>(peak), Q_MAX * SCALE_FLOOR);
    verdict.dead = !finite || peak == 0;
    verdict.reciprocal = divide(Q_MAX, floored);
    scale = !finite ? as_float(F32_NAN) : 1.0f;
    if (!verdict.dead && thread_of_row() == 0) scale = divide(floored, Q_MAX);
  }
  if (thread_of_row() == 0) scales[row] = scale;
  return verdict;
}

// Element j of a piece as a single, times r.
SS_DEVICE float scaled(const Piece& piece, int j, float r) {
  const float x = SS_IN == SS_F32 ? as_float(piece.word[j & 3]) : unpack<SS_IN>(piece.word[j / 2 & 3], j & 1);
  return mul(x, r);
}

// This thread's pieces of a row of `length` bytes, quantized, into shared memory.
SS_DEVICE void stage_pieces(const Piece (&pieces)[SS_VECTORS], float r, u32 stage, int length) {
  const int start = opaque(thread_of_row()), step = threads_of_row();
#pragma unroll
  for (int v = 0; v < SS_VECTORS; ++v) {
    if (!SS_TILED && (start + v * step) * 16 >= length) break;
    u32 word[4];
    if constexpr (QUANTIZED) {
#pragma unroll
      for (int i = 0; i < ELEMENTS / 4; ++i) {
        word[i] = quantize4<SS_OUT, SS_STATIC>(
            scaled(pieces[v], 4 * i, r), scaled(pieces[v], 4 * i + 1, r),
            scaled(pieces[v], 4 * i + 2, r), scaled(pieces[v], 4 * i + 3, r));
      }
    } else {
#pragma unroll
      for (int i = 0; i < REGISTERS; ++i) word[i] = pieces[v].word[i];
    }
    if constexpr (SS_WEIGHT && SS_OUT != SS_S8) {
#pragma unroll
      for (int i = 0; i < STAGE_BYTES / 4; ++i) word[i] = positive_zeros<SS_OUT>(word[i]);
    }
    const u32 target = stage + (start + v * step) * STAGE_BYTES;
    if constexpr (STAGE_BYTES == 16) {
      shared_store16(target, word[0], word[1], word[2], word[3]);
    } else if constexpr (STAGE_BYTES == 8) {
      shared_store8(target, word[0], word[1]);
    } else {
      shared_store4(target, word[0]);
    }
  }
}

// In what follows `out` is where the thread's first chunk (number thread_of_row()) of 16 bytes lies.
SS_DEVICE void store_chunk(u8* out, int chunk, uint4 value) {
  *reinterpret_cast<uint4*>(out + (chunk - thread_of_row()) * static_cast<i64>(16)) = value;
}

SS_DEVICE uint4 chunk_of(u32 stage, int chunk) {
  if constexpr (QUANTIZED) {
    return Windows::chunk8(stage, chunk * CHUNK_WINDOWS);
  } else {
    return Windows::chunk16(stage, chunk * CHUNK_WINDOWS);
  }
}

// Chunks from `begin` to `end` of a row of which the first `windows` windows are filled: from the
// stage, or, where the row is dead, with zeros or (lift only) NaN.
SS_DEVICE void write_checked(u8* out, u32 stage, int begin, int end, int windows, bool dead) {
  const u32 fill = QUANTIZED ? 0 : NAN_PAIR;
#pragma unroll 1
  for (int chunk = begin + thread_of_row(); chunk < end; chunk += threads_of_row()) {
    const int left = windows - chunk * CHUNK_WINDOWS;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (left > 0) value = dead ? make_uint4(fill, fill, fill, fill) : chunk_of(stage, chunk);
    // A window is one word of 8-bit slots or two words of 16-bit slots.
    if (left < CHUNK_WINDOWS) {
      if (QUANTIZED && left < 2) value.y = 0;
      if (left < (QUANTIZED ? 3 : 2)) value.z = 0;
      if (left < (QUANTIZED ? 4 : 2)) value.w = 0;
    }
    store_chunk(out, chunk, value);
  }
}

// The same for a row that is not dead, fast: nearly all chunks are full, and how many of them are a
// thread's is known when the kernel is compiled.
SS_DEVICE void write_chunks(u8* out, u32 stage, int chunks, int windows) {
  constexpr int SLOT_BYTES = SS_WINDOWS * 4 * bytes_of(SS_OUT);
  constexpr int SHARE = (SS_VECTORS * ELEMENTS * SLOT_BYTES + SS_GROUP * 16 - 1) / (SS_GROUP * 16);
  const int filled = windows / CHUNK_WINDOWS;
  const int full = filled < chunks ? filled : chunks;
  const int first = opaque(thread_of_row());
#pragma unroll
  for (int i = 0; i < SHARE; ++i) {
    const int chunk = first + i * threads_of_row();
    if (chunk < full) store_chunk(out, chunk, chunk_of(stage, chunk));
  }
  const int shared = SHARE * threads_of_row();
  write_checked(out, stage, shared < full ? shared : full, chunks, windows, false);
}

// x (rows, columns) with `x_stride` bytes from row to row; q (padded_rows, q_pitch bytes), 16-byte
// aligned; given: scales to use (SS_STATIC), `given_step` 0 (one for all) or 1 (one a row);
// stage_bytes: shared memory for one row; tile: inputs of one tile (SS_TILED).
SS_KERNEL(SS_MAX_THREADS, SS_MIN_BLOCKS)
quantize_lift(const u8* x, i64 x_stride, u8* q, i64 q_pitch, float* scales, const float* given,
              int given_step, int rows, int padded_rows, int columns, int stage_bytes, int tile) {
  SS_STAGE(shared);
  __shared__ u32 partial[32];
  let_next_launch_begin();
  const int warp = SS_WARP_ROW ? threadIdx.x >> 5 : 0;
  const int rows_of_block = SS_WARP_ROW ? blockDim.x >> 5 : 1;
  const u32 stage = shared_address(shared) + warp * stage_bytes;
  const int chunks = static_cast<int>(q_pitch >> 4);
  const int windows = (columns + SS_GROUP - 1) / SS_GROUP * SS_WINDOWS;
  const int length = columns * bytes_of(SS_IN);
  int row = blockIdx.x * rows_of_block + warp;
  const int step = gridDim.x * rows_of_block;
  const u8* source = x + row * x_stride + thread_of_row() * 16;
  u8* out = q + row * q_pitch + thread_of_row() * 16;

  // What no piece is ever staged to: the last group's missing inputs are zeros.
  const int held = threads_of_row() * SS_VECTORS * 16;
  const int staged = (SS_TILED ? held : length + 15) / 16 * STAGE_BYTES;
  for (int at = staged + 4 * thread_of_row(); at < stage_bytes; at += 4 * threads_of_row()) {
    shared_store4(stage + at, 0);
  }

  Piece pieces[SS_VECTORS];
  if (!SS_TILED && row < rows) load_row(pieces, source, length);
#pragma unroll 1
  for (; row < padded_rows; row += step, out += step * q_pitch) {
    if (row >= rows) {
      write_checked(out, stage, 0, chunks, 0, true);
      continue;
    }
    if constexpr (!SS_TILED) {
      cast_pieces(pieces);
      const u32 peak = row_peak(peak_of(pieces), partial);
      const Verdict verdict = judge(peak, row, scales, given, given_step);
      if (!verdict.dead) stage_pieces(pieces, verdict.reciprocal, stage, length);
      source += step * x_stride;
      if (row + step < rows) load_row(pieces, source, length);
      sync_row();
      if (verdict.dead) {
        write_checked(out, stage, 0, chunks, windows, true);
      } else {
        write_chunks(out, stage, chunks, windows);
      }
    } else {
      u32 peak = 0;
      for (int base = 0; base < length; base += held) {
        load_row(pieces, source + base, length - base);
        cast_pieces(pieces);
        peak = max_magnitude<SEEN>(peak, peak_of(pieces));
      }
      const Verdict verdict = judge(row_peak(peak, partial), row, scales, given, given_step);
      const int tile_bytes = tile * bytes_of(SS_IN);
      const int tile_chunks = tile / SS_GROUP * SS_WINDOWS / CHUNK_WINDOWS;
      for (int base = 0, done = 0; done < chunks && !verdict.dead; base += tile_bytes, done += tile_chunks) {
        load_row(pieces, source + base, length - base);
        cast_pieces(pieces);
        sync_row();
        stage_pieces(pieces, verdict.reciprocal, stage, length);
        sync_row();
        const int left = chunks - done, filled = windows - done * CHUNK_WINDOWS;
        write_chunks(out + done * static_cast<i64>(16), stage, left < tile_chunks ? left : tile_chunks,
                     filled > 0 ? filled : 0);
      }
      if (verdict.dead) write_checked(out, stage, 0, chunks, windows, true);
      source += step * x_stride;
    }
  }
}
