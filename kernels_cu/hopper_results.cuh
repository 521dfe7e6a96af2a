// From a tile's sums in registers to results in memory: scales, bias, type (hopper_gemm.cu).
#pragma once

#include "hopper.cuh"

// How results can be stored.
constexpr int SIDE_BY_SIDE = 1, IN_BOXES = 2;  // 0: one by one

struct Epilogue {
  const float* token_scales;
  const float* channel_scales;
  const float* bias;
  u8* out;
  i64 out_stride;  // elements
  const TensorMap* map;
  int storing;
};

// Scales of a tile's tokens to this warp's own shared memory; a lane has every 32nd.
SS_DEVICE void fetch_scales(u32 own_scales, const float* scales, int first, int tokens) {
  constexpr int EACH = (TOKENS + 31) / 32;
  const int lane = threadIdx.x & 31;
  float held[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int token = first + 32 * i + lane;
    held[i] = scales && token < tokens ? scales[token] : 1.0f;
  }
  __syncwarp();  // nobody reads those of the tile before any more
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (TOKENS % 32 == 0 || 32 * i + lane < TOKENS) {
      shared_store4(own_scales + (32 * i + lane) * 4, as_bits(held[i]));
    }
  }
  __syncwarp();
}

// Scale and bias of the channels that a thread has.
struct Channels {
  float scale[2 * BLOCKS], offset[2 * BLOCKS];
};

SS_DEVICE Channels channels_of(const Epilogue& to, int channel, int left) {
  Channels channels;
#pragma unroll
  for (int c = 0; c < 2 * BLOCKS; ++c) {
    channels.scale[c] = to.channel_scales && c < left ? to.channel_scales[channel + c] : 1.0f;
    channels.offset[c] = to.bias && c < left ? to.bias[channel + c] : -0.0f;
  }
  return channels;
}

// A thread's sums of tokens 8j + 2q and the next: its channels 2m + h of token e at 2h + e.
struct Quads {
  u32 of[BLOCKS][4];
};

SS_DEVICE Quads quads_of(const Sums& sums, int j) {
  Quads quads;
#pragma unroll
  for (int i = 0; i < 4 * BLOCKS; ++i) quads.of[i / 4][i % 4] = sums.of[i / 4][4 * j + i % 4];
  return quads;
}

// A thread's channels of one of these tokens, finished.
struct Results {
  float of[2 * BLOCKS];
};

SS_DEVICE Results finish(const Quads& quads, const Channels& channels, uint2 scales, int e) {
  const float of_token = as_float(e ? scales.y : scales.x);
  Results results;
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 sum = quads.of[m][2 * h + e];
      const float value = INTEGER ? from_int(static_cast<int>(sum)) : as_float(sum);
      const int c = 2 * m + h;
      results.of[c] = add(mul(mul(value, of_token), channels.scale[c]), channels.offset[c]);
    }
  }
  return results;
}

constexpr int RESULT_WORDS = BLOCKS * OUT_BYTES / 2;
struct Packed {
  u32 word[RESULT_WORDS];
};

SS_DEVICE Packed pack_results(const Results& results) {
  Packed packed;
#pragma unroll
  for (int c = 0; c < 2 * BLOCKS; c += 2) {
    if constexpr (SS_OUT == SS_F32) {
      packed.word[c] = as_bits(results.of[c]), packed.word[c + 1] = as_bits(results.of[c + 1]);
    } else {
      packed.word[c / 2] =
          pack16<SS_OUT == SS_F16 ? SS_F16 : SS_BF16>(results.of[c], results.of[c + 1]);
    }
  }
  return packed;
}

// Two tokens straight to memory, the first at `out`, of which `rest` are left.  VECTOR: all of a thread's
// channels exist, and a token's can be stored at once; else `left` exist.
template <bool VECTOR>
SS_DEVICE void store_two(const Quads& quads, const Channels& channels, u32 scales, u8* out, i64 row_bytes,
                         int left, int rest) {
  const uint2 pair = shared_load8(scales);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const Packed packed = pack_results(finish(quads, channels, pair, e));
    u8* const at = out + e * row_bytes;
    if (e < rest) {
      if constexpr (VECTOR) {
        if constexpr (RESULT_WORDS == 4) {
          store_result(at, make_uint4(packed.word[0], packed.word[1], packed.word[2], packed.word[3]));
        } else if constexpr (RESULT_WORDS == 2) {
          store_result(at, make_uint2(packed.word[0], packed.word[1]));
        } else {
          store_result(at, packed.word[0]);
        }
      } else {
#pragma unroll
        for (int c = 0; c < 2 * BLOCKS; ++c) {
          if (c >= left) break;
          if constexpr (SS_OUT == SS_F32) {
            reinterpret_cast<u32*>(at)[c] = packed.word[c % RESULT_WORDS];
          } else {
            reinterpret_cast<u16*>(at)[c] = static_cast<u16>(packed.word[c / 2] >> (16 * (c & 1)));
          }
        }
      }
    }
  }
}

template <bool VECTOR>
SS_DEVICE void store_directly(const Sums& sums, const Channels& channels, u32 scales, int first,
                              int channel, int left, const Shape& shape, const Epilogue& to) {
  const i64 row_bytes = to.out_stride * OUT_BYTES;
  u8* out = to.out + first * row_bytes + static_cast<i64>(channel) * OUT_BYTES;
  int rest = shape.tokens - first;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j) {
    store_two<VECTOR>(quads_of(sums, j), channels, scales + 32 * j, out, row_bytes, left, rest);
    rest -= 8;
    out += 8 * row_bytes;
  }
}

// Through shared memory, by the copy engine, which leaves out what is beyond the result.  `buffers`: the
// warp's own two; no other warp is waited for.
SS_DEVICE void store_boxes(const Sums& sums, const Channels& channels, u32 scales, int first_channel,
                           int first_token, u32 buffers, const Epilogue& to) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  const int byte = 4 * g * OUT_BYTES;  // of the token's row in a box
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
    const u32 box = buffers + (chunk & 1) * BOX_BYTES;
    // The store before the last has read the buffer that comes next; the tile before may have ended
    // with either buffer.
    if (lane == 0) {
      if (chunk) {
        stores_wait_read<1>();
      } else {
        stores_wait_read<0>();
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j) {
      const int from = chunk * (CHUNK / 8) + j;
      const uint2 pair = shared_load8(scales + 32 * from);
      const Quads quads = quads_of(sums, from);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Packed packed = pack_results(finish(quads, channels, pair, e));
        const int row = 8 * j + 2 * q + e;
        // The swizzle of the copy engine: over 64 bytes pairs of rows differ, over 128 each row.
        const int swizzled = (byte >> 4) ^ (BOX_ROW == 64 ? row >> 1 & 3 : row & 7);
        const u32 at = box + row * BOX_ROW + (swizzled << 4) + (byte & 15);
        if constexpr (RESULT_WORDS == 4) {
          shared_store16(at, packed.word[0], packed.word[1], packed.word[2], packed.word[3]);
        } else {
          shared_store8(at, packed.word[0], packed.word[1 % RESULT_WORDS]);
        }
      }
    }
    visible_to_copies();
    __syncwarp();
    if (lane == 0) {
      store_box(to.map, first_channel, first_token + chunk * CHUNK, box);
      stores_commit();
    }
  }
}

// The first of the 32 channels of which a warp has all, or every other pair.
SS_DEVICE int first_channel_of(const Item& item, int group, int warp) {
  return block_of(item, group) / 2 * 128 + 32 * warp;
}
// A thread's first channel from there on.
SS_DEVICE int own_channel(const Item& item, int group) {
  return 4 * (threadIdx.x >> 2 & 7) + 2 * (block_of(item, group) & 1);
}

// What a warp needs to know of a tile's results.
struct Target {
  int first_token, token;            // of the tile, of this thread
  int first_channel, channel, left;  // of the warp, of this thread, and how many there are from there on
  u32 scales, buffers;               // shared memory: scales of tokens from `token` on, room for results
};

SS_DEVICE Target target_of(const Item& item, const Place& place, const Shape& shape) {
  const int lane = threadIdx.x & 31;
  Target target;
  target.first_token = item.token_tile * TOKENS, target.token = target.first_token + 2 * (lane & 3);
  target.first_channel = first_channel_of(item, place.group, place.warp);
  target.channel = target.first_channel + own_channel(item, place.group);
  target.left = shape.channels - target.channel;
  target.scales = place.scales() + 8 * (lane & 3), target.buffers = place.buffers();
  return target;
}

SS_DEVICE bool stores_vectors(const Target& target, const Epilogue& to) {
  return to.storing >= SIDE_BY_SIDE && target.left >= 2 * BLOCKS;
}

SS_DEVICE void write_tile(const Sums& sums, const Channels& channels, const Target& target, const Shape& shape,
                          const Epilogue& to) {
  if (BOXES && to.storing == IN_BOXES) {
    if (target.first_channel < shape.channels) {
      store_boxes(sums, channels, target.scales, target.first_channel, target.first_token, target.buffers, to);
    }
  } else if (target.left > 0) {
    if (stores_vectors(target, to)) {
      store_directly<true>(sums, channels, target.scales, target.token, target.channel, target.left, shape, to);
    } else {
      store_directly<false>(sums, channels, target.scales, target.token, target.channel, target.left, shape, to);
    }
  }
  __syncwarp();  // the warp goes on as one: products need it
}
