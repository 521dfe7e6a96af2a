// Sparse GEMM for Hopper (sm_90a): y = cast((single(W' x') * s_m) * s_n + bias), one pass.
//
// docs/hopper-kernel.md has the picture, the budget of bytes and cycles, and what was tried.
//
// A block stays on its multiprocessor and works through tiles of ROWS output channels times TOKENS
// tokens.  Its last warpgroup loads: one thread asks the copy engine for tokens and weights, up to STAGES
// stages of 128 bytes of K' ahead.  The other GROUPS warpgroups multiply: each has BLOCKS blocks of 64
// channels.  The tensor cores read both operands from shared memory; only the metadata of the sparse one
// passes through registers.
//
// Packed weights (hopper_pack.cu): panels of 128 channels; a panel has for every stage two units, one for
// each of its blocks of 64 channels; a unit is 64 rows of 64 bytes, swizzled as the tensor cores want
// them, then the metadata: for 8-bit types one word a thread for each half of the stage's K', for 16-bit
// types one word a thread for both.  Row r = 16 * warp + g + 8 * h of block m of a panel is channel 32 *
// warp + 4 * g + 2 * m + h of it: so the four (or two) channels that a thread gets of a token lie side by
// side.
//
// SS_KGROUPS: the warpgroups have the same channels and take turns at steps of 256 bytes of K'; their
// sums meet in shared memory.  SS_STREAM: tiles that would not fill all multiprocessors are cut into
// equal stretches of K', one a block, wherever tiles begin and end ("stream-K"); sums of blocks that
// share a tile meet in `partials`, added by the last to finish, in the order of K': repeated runs give
// the same bits.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_TYPE     int8, E4M3, bfloat16 or float16 (numbers.cuh); SS_OUT float32, float16, bfloat16
//   SS_TOKENS   tokens of a tile; SS_BLOCKS blocks of 64 channels of a warpgroup, 1 or 2
//   SS_GROUPS   warpgroups that multiply; SS_KGROUPS and SS_STREAM as above; SS_STAGES stages
#include "hopper.cuh"
#include "wgmma_sparse.cuh"

constexpr int TOKENS = SS_TOKENS, BLOCKS = SS_BLOCKS, GROUPS = SS_GROUPS, STAGES = SS_STAGES;
constexpr bool K_GROUPS = SS_KGROUPS, STREAM = SS_STREAM;
constexpr int GROUP_THREADS = 128;
constexpr bool WIDE = bytes_of(SS_TYPE) == 2;
constexpr bool INTEGER = SS_TYPE == SS_S8;
constexpr int OUT_BYTES = bytes_of(SS_OUT);
// 32-bit sums of a thread for one block of 64 channels.
constexpr int SUMS = TOKENS / 2;

// Warpgroups that take turns at K': of every so many steps of 256 bytes, one has one.
constexpr int TURNS = K_GROUPS ? GROUPS : 1;

// A stage in shared memory: tokens, then the units of all warpgroups that work on it at a time.
constexpr int VALUE_BYTES = 64 * 64;
constexpr int UNIT = VALUE_BYTES + GROUP_THREADS * (WIDE ? 4 : 8);
constexpr int UNITS = BLOCKS * (K_GROUPS ? 1 : GROUPS);
constexpr int TOKEN_BYTES = TOKENS * 128;
constexpr int STAGE_BYTES = TOKEN_BYTES + (UNITS * UNIT + 1023) / 1024 * 1024;
// A stage is 2 * BLOCKS products: for each half of its 128 bytes of K', one for each block.
constexpr int PRODUCTS = 2 * BLOCKS;
// Products of a warpgroup that are under way at a time.
constexpr int IN_FLIGHT = 2;

// Results leave through shared memory, CHUNK tokens at a time, in boxes of 128 bytes of channels; two
// buffers a warpgroup.  A warpgroup with one block has every other pair of channels and stores directly.
constexpr bool BOXES = BLOCKS == 2;
constexpr int CHUNK = TOKENS % 32 || OUT_BYTES == 4 ? 16 : 32;
constexpr int BOX_CHANNELS = 128 / OUT_BYTES;
constexpr int BOX_BYTES = CHUNK * 128;
constexpr int BUFFER_BYTES = 64 * BLOCKS / BOX_CHANNELS * BOX_BYTES;

// Shared memory: stages, result buffers, scales of tokens for each warp, sums of warpgroups, barriers,
// whether this block is the last of a tile.  kernels/hopper_tiles.py adds up the same.
constexpr int RESULTS = STAGES * STAGE_BYTES;
constexpr int SCALES = RESULTS + (BOXES ? GROUPS * 2 * BUFFER_BYTES : 0);
constexpr int GATHER = SCALES + GROUPS * 4 * TOKENS * 4;
constexpr int BARRIERS = GATHER + (K_GROUPS ? (GROUPS - 1) * BLOCKS * SUMS * GROUP_THREADS * 4 : 0);

// A barrier tells only even from odd uses of a stage: who waits for one must have seen the use before.
// Where warpgroups take turns, each stage must therefore always be the same warpgroup's.
static_assert(!K_GROUPS || STAGES % (2 * GROUPS) == 0, "stages must be whole rounds of turns");

// Names of barriers among warpgroups; STORING + group is one warpgroup's own.
constexpr u32 GATHER_FULL = 1, GATHER_FREE = 2, PART_WRITTEN = 3, PART_KNOWN = 4, STORING = 5;

// A warpgroup that multiplies may need more registers than an even share, one that loads needs few.
constexpr bool UNEVEN = GROUPS == 2 && BLOCKS * TOKENS >= 128;

struct Sums {
  u32 of[BLOCKS][SUMS];
};

struct Shape {
  int tokens, channels, steps, panels;
  int weight_tiles, token_tiles, group, streamed;
};

// Which part of the product a block works on.
struct Item {
  int weight_tile, token_tile;
  int first, count;  // steps of 256 bytes of K'
  int next;          // where this block goes on
  int tile, at;      // of a streamed tile: its number, and the units before this part
};

// The first `streamed` tiles are a row of units, TURNS steps of K' each (the last of a tile has what is
// left too), which blocks share evenly; the other tiles are dealt out whole, afterwards.  A place in
// that work is a unit's number, or `units` more than the number of a whole tile after them.
SS_DEVICE int units_of_tile(const Shape& shape) { return shape.steps / TURNS; }
SS_DEVICE int units_of(const Shape& shape) { return STREAM ? shape.streamed * units_of_tile(shape) : 0; }

SS_DEVICE int first_unit(u32 block, u32 units, u32 blocks) {
  const u32 each = units / blocks, rest = units - each * blocks;
  return block * each + (block < rest ? block : rest);
}

// The block that has unit `unit`; there are no fewer units than blocks.
SS_DEVICE u32 block_with(u32 unit, u32 units, u32 blocks) {
  const u32 each = units / blocks, rest = units - each * blocks, of_longer = rest * (each + 1);
  return unit < of_longer ? unit / (each + 1) : rest + (unit - of_longer) / each;
}

SS_DEVICE int first_place(const Shape& shape, u32 block, u32 blocks) {
  if constexpr (!STREAM) return block;
  const int units = units_of(shape), first = first_unit(block, units, blocks);
  return first < units ? first : units + static_cast<int>(block);
}

SS_DEVICE int end_of_places(const Shape& shape) {
  return shape.weight_tiles * shape.token_tiles - (STREAM ? shape.streamed : 0) + units_of(shape);
}

// Tiles in the order in which blocks take them: `group` weight tiles wide, all token tiles deep, so
// that what runs at a time shares both operands in L2.
SS_DEVICE Item item_of(int place, const Shape& shape, u32 block, u32 blocks) {
  Item item;
  const int units = units_of(shape);
  int tile = place;
  item.first = 0, item.count = shape.steps, item.next = place + blocks, item.at = 0;
  if constexpr (STREAM) {
    if (place < units) {
      const int of_tile = units_of_tile(shape);
      tile = place / of_tile;
      const int begin = tile * of_tile, mine = first_unit(block + 1, units, blocks);
      const int end = mine < begin + of_tile ? mine : begin + of_tile;
      item.at = place - begin;
      item.first = item.at * TURNS;
      item.count = (end == begin + of_tile ? shape.steps : (end - begin) * TURNS) - item.first;
      item.next = end < mine ? end : units + static_cast<int>(block);
    } else {
      tile = place - units + shape.streamed;
    }
  }
  item.tile = tile;
  const int of_group = shape.group * shape.token_tiles;
  const int which = tile / of_group, rest = tile - which * of_group;
  const int first = which * shape.group;
  const int width = shape.weight_tiles - first < shape.group ? shape.weight_tiles - first : shape.group;
  item.token_tile = rest / width;
  item.weight_tile = first + rest - item.token_tile * width;
  return item;
}

// The first of a warpgroup's blocks of 64 channels.
SS_DEVICE int block_of(const Item& item, int group) {
  return (K_GROUPS ? item.weight_tile : item.weight_tile * GROUPS + group) * BLOCKS;
}

// --- loading --------------------------------------------------------------------------------------

SS_DEVICE void load_stages(const TensorMap* map, const u8* packed, const Shape& shape, u32 stages, u32 full,
                           u32 empty) {
  constexpr int TOGETHER = UNITS > 2 ? 2 : UNITS;  // units side by side in memory
  u32 position = 0;
  const int end = end_of_places(shape);
  int place = first_place(shape, blockIdx.x, gridDim.x);
  while (place < end) {
    const Item item = item_of(place, shape, blockIdx.x, gridDim.x);
    place = item.next;
    for (int stage = 2 * item.first; stage < 2 * (item.first + item.count); ++stage, ++position) {
      const u32 slot = position % STAGES, round = position / STAGES;
      const u32 barrier = full + 8 * slot, target = stages + slot * STAGE_BYTES;
      barrier_wait(empty + 8 * slot, (round & 1) ^ 1);
      barrier_arrive_for_bytes(barrier, TOKEN_BYTES + UNITS * UNIT);
      copy_box(target, map, stage * 128, item.token_tile * TOKENS, barrier);
#pragma unroll
      for (int unit = 0; unit < UNITS; unit += TOGETHER) {
        const int block = item.weight_tile * UNITS + unit;
        // Channels beyond the last panel are multiplied by its weights, and not stored.
        const int panel = block / 2 < shape.panels ? block / 2 : shape.panels - 1;
        const i64 number = (panel * static_cast<i64>(shape.steps * 2) + stage) * 2 + (block & 1);
        copy_bytes(target + TOKEN_BYTES + unit * UNIT, packed + number * UNIT, TOGETHER * UNIT, barrier);
      }
    }
  }
}

// --- multiplying ----------------------------------------------------------------------------------

// The metadata of product `p` of a stage.
SS_DEVICE u32 metadata_of(u32 units, int p, int thread) {
  const int half = p / BLOCKS;
  return shared_load4(units + p % BLOCKS * UNIT + VALUE_BYTES + ((WIDE ? 0 : half * GROUP_THREADS) + thread) * 4);
}

// Start product `p` of a stage.  `p` is a constant once the loops around it are unrolled.
SS_DEVICE void start_product(Sums& sums, u32 metadata, u32 tokens, u32 units, int p) {
  const int half = p / BLOCKS;
  products_fence();
  multiply(sums.of[p % BLOCKS], rows_of_64(units + p % BLOCKS * UNIT) + 2 * half,
           rows_of_128(tokens) + 4 * half, metadata, WIDE ? half : 0);
  products_commit();
}

SS_DEVICE u32 plus(u32 a, u32 b) { return INTEGER ? a + b : as_bits(add(as_float(a), as_float(b))); }

// Warpgroups that took turns at K': the first gets the sum, in the order of the warpgroups.
SS_DEVICE void gather_groups(Sums& sums, int group, int thread, u32 buffer, bool fresh, bool more) {
  constexpr u32 ALL = GROUPS * GROUP_THREADS;
  if (group > 0) {
    if (!fresh) named_barrier(GATHER_FREE, ALL);
    const u32 mine = buffer + (group - 1) * BLOCKS * SUMS * GROUP_THREADS * 4 + thread * 4;
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) {
      shared_store4(mine + i * GROUP_THREADS * 4, sums.of[i / SUMS][i % SUMS]);
    }
    named_barrier(GATHER_FULL, ALL);
    return;
  }
  named_barrier(GATHER_FULL, ALL);
#pragma unroll
  for (int other = 0; other < GROUPS - 1; ++other) {
    const u32 theirs = buffer + other * BLOCKS * SUMS * GROUP_THREADS * 4 + thread * 4;
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) {
      u32& sum = sums.of[i / SUMS][i % SUMS];
      sum = plus(sum, shared_load4(theirs + i * GROUP_THREADS * 4));
    }
  }
  // Without waiting: the others come here only after products that need this warpgroup to go on.
  if (more) named_barrier_arrive(GATHER_FREE, ALL);
}

// Blocks that share a tile: true for the last one, which gets the sum, in the order of K'.  A block
// that begins within a tile leaves its sums in the first of its two parts of `partials`, one that
// begins with a tile and ends within it in the second.
SS_DEVICE bool gather_blocks(Sums& sums, const Item& item, int group, int thread, const Shape& shape,
                             uint4* partials, u32* arrived, u32* last) {
  constexpr int WORKERS = K_GROUPS ? 1 : GROUPS;
  constexpr int PIECES = BLOCKS * SUMS / 4;  // of 16 bytes a thread
  constexpr i64 OF_PART = static_cast<i64>(WORKERS) * PIECES * GROUP_THREADS;
  const u32 blocks = gridDim.x, units = units_of(shape), of_tile = units_of_tile(shape);
  const u32 begin = item.tile * of_tile;
  const u32 first = block_with(begin, units, blocks), final = block_with(begin + of_tile - 1, units, blocks);
  if (first == final) return true;
  uint4* const own_place = partials + group * PIECES * GROUP_THREADS + thread;
  uint4* const mine = own_place + (2 * blockIdx.x + (item.at == 0)) * OF_PART;
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u32* const four = sums.of[4 * i / SUMS] + 4 * i % SUMS;
    mine[i * GROUP_THREADS] = make_uint4(four[0], four[1], four[2], four[3]);
  }
  fence_device();
  named_barrier(PART_WRITTEN, WORKERS * GROUP_THREADS);
  if (group == 0 && thread == 0) {
    // All threads' parts before the count, and the count before others' parts.  It is zero again after
    // the last, at once, so that launches that should not have met leave no trace in it.
    const u32 most = final - first;
    fence_device();
    *last = atomic_next(arrived + item.tile, most) == most;
    fence_device();
  }
  named_barrier(PART_KNOWN, WORKERS * GROUP_THREADS);
  if (!*last) return false;
  fence_device();
#pragma unroll
  for (int i = 0; i < BLOCKS * SUMS; ++i) sums.of[i / SUMS][i % SUMS] = 0;
#pragma unroll 1
  for (u32 block = first; block <= final; ++block) {
    const uint4* const theirs = own_place + (2 * block + (block == first)) * OF_PART;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      u32* const four = sums.of[4 * i / SUMS] + 4 * i % SUMS;
      const uint4 part = load_shared_by_blocks(theirs + i * GROUP_THREADS);
      four[0] = plus(four[0], part.x), four[1] = plus(four[1], part.y);
      four[2] = plus(four[2], part.z), four[3] = plus(four[3], part.w);
    }
  }
  return true;
}

// --- results --------------------------------------------------------------------------------------

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

// Scales of a tile's tokens: a lane has every 32nd.
struct TokenScales {
  float of[(TOKENS + 31) / 32];
};

SS_DEVICE void load_scales(TokenScales& held, const float* scales, int first, int tokens) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < (TOKENS + 31) / 32; ++i) {
    const int token = first + 32 * i + lane;
    held.of[i] = scales && token < tokens ? scales[token] : 1.0f;
  }
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

// A thread's channels of token 8j + 2q + e of the tile, finished.  `scales`: address of the token scales
// from token 2q on.
struct Results {
  float of[2 * BLOCKS];
};

SS_DEVICE Results finish(const Sums& sums, const Channels& channels, uint2 scales, int j, int e) {
  const float of_token = as_float(e ? scales.y : scales.x);
  Results results;
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 sum = sums.of[m][4 * j + 2 * h + e];
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

// Straight to memory.  VECTOR: all of a thread's channels exist, and a token's can be stored at once.
template <bool VECTOR>
SS_DEVICE void store_directly(const Sums& sums, u32 scales, int first, int channel, int left,
                              const Shape& shape, const Epilogue& to) {
  const Channels channels = channels_of(to, channel, VECTOR ? 2 * BLOCKS : left);
  const i64 row_bytes = to.out_stride * OUT_BYTES;
  u8* out = to.out + first * row_bytes + static_cast<i64>(channel) * OUT_BYTES;
  int rest = shape.tokens - first;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j) {
    const uint2 pair = shared_load8(scales + 32 * j);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Packed packed = pack_results(finish(sums, channels, pair, j, e));
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
    rest -= 8;
    out += 8 * row_bytes;
  }
}

// Through shared memory, by the copy engine, which leaves out what is beyond the result.  `buffer`: the
// warpgroup's two buffers.
SS_DEVICE void store_boxes(const Sums& sums, u32 scales, const Item& item, int group, int thread,
                           u32 buffer, int channel, int left, const Epilogue& to) {
  const Channels channels = channels_of(to, channel, left);
  const int lane = thread & 31, warp = thread >> 5, g = lane >> 2, q = lane & 3;
  constexpr int WARPS_A_BOX = BOX_CHANNELS / 32;
  // Of the token's 128 bytes in a box: which 16, before swizzling, and where in them.
  const int byte = (warp % WARPS_A_BOX * 32 + 4 * g) * OUT_BYTES;
  const u32 in_box = buffer + warp / WARPS_A_BOX * BOX_BYTES;
  const int first_channel = block_of(item, group) * 64;
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
    const u32 half = (chunk & 1) * BUFFER_BYTES;
    // The store before the last has read the buffer that comes next; the tile before may have ended
    // with either buffer.
    if (thread == 0) {
      if (chunk) {
        stores_wait_read<1>();
      } else {
        stores_wait_read<0>();
      }
    }
    named_barrier(STORING + group, GROUP_THREADS);
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j) {
      const uint2 pair = shared_load8(scales + 32 * (chunk * (CHUNK / 8) + j));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Packed packed = pack_results(finish(sums, channels, pair, chunk * (CHUNK / 8) + j, e));
        const int row = 8 * j + 2 * q + e;
        const u32 at = in_box + half + row * 128 + (((byte >> 4) ^ (row & 7)) << 4) + (byte & 15);
        if constexpr (RESULT_WORDS == 4) {
          shared_store16(at, packed.word[0], packed.word[1], packed.word[2], packed.word[3]);
        } else {
          shared_store8(at, packed.word[0], packed.word[1 % RESULT_WORDS]);
        }
      }
    }
    visible_to_copies();
    named_barrier(STORING + group, GROUP_THREADS);
    if (thread == 0) {
#pragma unroll
      for (int box = 0; box < 64 * BLOCKS / BOX_CHANNELS; ++box) {
        store_box(to.map, first_channel + box * BOX_CHANNELS, item.token_tile * TOKENS + chunk * CHUNK,
                  buffer + half + box * BOX_BYTES);
      }
      stores_commit();
    }
  }
}

// `own_scales`: shared memory of this warp for the scales of its tokens.
SS_DEVICE void write_tile(const Sums& sums, const TokenScales& held, u32 own_scales, u32 buffer,
                          const Item& item, int group, int thread, const Shape& shape, const Epilogue& to) {
  const int lane = thread & 31, warp = thread >> 5;
  const int block = block_of(item, group);
  const int channel = block / 2 * 128 + 32 * warp + 4 * (lane >> 2) + 2 * (block & 1);
  const int left = shape.channels - channel;
  const int first = item.token_tile * TOKENS + 2 * (lane & 3);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (TOKENS + 31) / 32; ++i) {
    if (TOKENS % 32 == 0 || 32 * i + lane < TOKENS) {
      shared_store4(own_scales + (32 * i + lane) * 4, as_bits(held.of[i]));
    }
  }
  __syncwarp();
  const u32 scales = own_scales + 8 * (lane & 3);
  if (BOXES && to.storing == IN_BOXES) {
    if (block * 64 < shape.channels) {
      store_boxes(sums, scales, item, group, thread, buffer, channel, left, to);
    }
  } else if (left > 0) {
    if (to.storing >= SIDE_BY_SIDE && left >= 2 * BLOCKS) {
      store_directly<true>(sums, scales, first, channel, left, shape, to);
    } else {
      store_directly<false>(sums, scales, first, channel, left, shape, to);
    }
  }
  __syncwarp();  // the warp goes on as one: products need it
}

// --- the kernel -----------------------------------------------------------------------------------

SS_KERNEL((GROUPS + 1) * GROUP_THREADS, 1)
hopper_gemm(const __grid_constant__ TensorMap token_map, const __grid_constant__ TensorMap out_map,
            const u8* packed, const float* token_scales, const float* channel_scales, const float* bias,
            u8* out, i64 out_stride, uint4* partials, u32* arrived, int tokens, int channels, int steps,
            int panels, int weight_tiles, int token_tiles, int tile_group, int streamed, int storing) {
  SS_ALIGNED_STAGE(shared);
  const u32 stages = shared_address(shared);
  const u32 full = stages + BARRIERS, empty = full + 8 * STAGES;
  u32* const last = reinterpret_cast<u32*>(shared + BARRIERS + 16 * STAGES);
  const Shape shape{tokens, channels, steps, panels, weight_tiles, token_tiles, tile_group, streamed};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(full + 8 * slot, 1);
      barrier_init(empty + 8 * slot, 4 * (K_GROUPS ? 1 : GROUPS));
    }
    barrier_init_done();
  }
  __syncthreads();

  // The same for all threads of a warp, and known to be: products need it.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / GROUP_THREADS, 0);
  if (group == GROUPS) {
    if constexpr (UNEVEN) give_registers<24>();
    if (threadIdx.x == GROUPS * GROUP_THREADS) load_stages(&token_map, packed, shape, stages, full, empty);
    return;
  }
  if constexpr (UNEVEN) take_registers<240>();
  const int thread = threadIdx.x % GROUP_THREADS;
  const bool speaks = (thread & 31) == 0;
  const Epilogue to{token_scales, channel_scales, bias, out, out_stride, &out_map, storing};
  const u32 turn = K_GROUPS ? group : 0;
  const u32 own_units = TOKEN_BYTES + (K_GROUPS ? 0 : group * BLOCKS * UNIT);
  const u32 own_scales = stages + SCALES + threadIdx.x / 32 * (TOKENS * 4);
  const u32 own_buffer = stages + RESULTS + group * 2 * BUFFER_BYTES;
  u32 position = 0;  // stages of all former items
  Sums sums;
  // Fetched one product ahead; products in flight read theirs.
  u32 metadata[4];
  static_assert(IN_FLIGHT + 2 <= 4, "a product's metadata must not be overwritten");

  int place = first_place(shape, blockIdx.x, gridDim.x);
  bool fresh = true;
#pragma unroll 1
  while (true) {
    const int of_item = item_of(place, shape, blockIdx.x, gridDim.x).count;
    const int count = (of_item - static_cast<int>(turn) + TURNS - 1) / TURNS;
    // Rather than telling the first products to ignore what the registers hold: older compilers (CUDA
    // 12.8) then see registers of a product in flight defined, and serialise all products.
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) sums.of[i / SUMS][i % SUMS] = 0;
    u32 at = position + 2 * turn;
    u32 before = 0;  // the stage before this one, to be released once its products are done
    u32 slot = at % STAGES;
    u32 stage_tokens = stages + slot * STAGE_BYTES;
    barrier_wait(full + 8 * slot, at / STAGES & 1);
    metadata[0] = metadata_of(stage_tokens + own_units, 0, thread);
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      const u32 at_next = at + 2 * TURNS;
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        const u32 units = stage_tokens + own_units;
        const u32 follower = stage ? at_next : at + 1;
        const u32 next_slot = follower % STAGES;
#pragma unroll
        for (int p = 0; p < PRODUCTS; ++p) {
          const int o = stage * PRODUCTS + p;
          start_product(sums, metadata[o % 4], stage_tokens, units, p);
          if (p + 1 < PRODUCTS) metadata[(o + 1) % 4] = metadata_of(units, p + 1, thread);
          products_wait<IN_FLIGHT>();
          // Of the former stage no product is in flight any more.
          if (p == IN_FLIGHT - 1 && speaks && (stage || step)) barrier_arrive(empty + 8 * before);
          // Only then: the next stage may have to be loaded to where the former one was.
          if (p + 1 == PRODUCTS && (stage == 0 || step + 1 < count)) {
            barrier_wait(full + 8 * next_slot, follower / STAGES & 1);
            metadata[(o + 1) % 4] = metadata_of(stages + next_slot * STAGE_BYTES + own_units, 0, thread);
          }
        }
        before = slot;
        slot = next_slot;
        stage_tokens = stages + slot * STAGE_BYTES;
      }
      at = at_next;
    }
    // Worked out again, so that it occupies no registers in the loop above.
    const Item item = item_of(opaque(place), shape, blockIdx.x, gridDim.x);
    const bool more = item.next < end_of_places(shape);
    TokenScales scales;
    load_scales(scales, token_scales, item.token_tile * TOKENS, tokens);
    products_wait<0>();
    if (speaks) barrier_arrive(empty + 8 * before);
    position += 2 * of_item;

    bool mine = true;
    if constexpr (K_GROUPS) {
      gather_groups(sums, group, thread, stages + GATHER, fresh, more);
      mine = group == 0;
    }
    if (STREAM && mine && place < units_of(shape)) {
      mine = gather_blocks(sums, item, K_GROUPS ? 0 : group, thread, shape, partials, arrived, last);
    }
    if (mine) write_tile(sums, scales, own_scales, own_buffer, item, group, thread, shape, to);
    if (!more) break;
    fresh = false;
    place = item.next;
  }
  // Shared memory must outlive the stores that read it.
  if (BOXES && thread == 0) stores_wait_read<0>();
}
