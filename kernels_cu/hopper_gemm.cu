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
// sums meet in shared memory.  SS_SPLITS: blocks may share tiles, each with a part of K': those tiles that
// would not fill all multiprocessors, or wherever equal parts of all K' begin and end.  Their sums meet in
// `partials`, where those blocks that are there when the last has come add them up, in the order of K':
// repeated runs give the same bits.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_TYPE     int8, E4M3, bfloat16 or float16 (numbers.cuh); SS_OUT float32, float16, bfloat16
//   SS_TOKENS   tokens of a tile; SS_BLOCKS blocks of 64 channels of a warpgroup, 1 or 2
//   SS_GROUPS   warpgroups that multiply; SS_KGROUPS and SS_SPLITS as above; SS_STAGES stages
#include "hopper.cuh"
#include "wgmma_sparse.cuh"

constexpr int TOKENS = SS_TOKENS, BLOCKS = SS_BLOCKS, GROUPS = SS_GROUPS, STAGES = SS_STAGES;
constexpr bool K_GROUPS = SS_KGROUPS, SPLITS = SS_SPLITS, EACH_LANE = SS_EACHLANE;
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

// Results leave through shared memory, in boxes of a warp's 32 channels by CHUNK tokens; each warp has two
// buffers.  A warpgroup with one block has every other pair of channels and stores directly.
constexpr bool BOXES = BLOCKS == 2;
constexpr int CHUNK = TOKENS % 32 || OUT_BYTES == 4 ? 16 : 32;
constexpr int BOX_ROW = 32 * OUT_BYTES;
constexpr int BOX_BYTES = CHUNK * BOX_ROW;

// Shared memory: stages, result buffers, scales of tokens for each warp, sums of warpgroups, barriers,
// which share of a tile this block has.  kernels/hopper_tiles.py adds up the same.
constexpr int RESULTS = STAGES * STAGE_BYTES;
constexpr int SCALES = RESULTS + (BOXES ? GROUPS * 4 * 2 * BOX_BYTES : 0);
constexpr int GATHER = SCALES + GROUPS * 4 * TOKENS * 4;
constexpr int BARRIERS = GATHER + (K_GROUPS ? (GROUPS - 1) * BLOCKS * SUMS * GROUP_THREADS * 4 : 0);

// A barrier tells only even from odd uses of a stage: who waits for one must have seen the use before.
// Where warpgroups take turns, each stage must therefore always be the same warpgroup's.
static_assert(!K_GROUPS || STAGES % (2 * GROUPS) == 0, "stages must be whole rounds of turns");

// Names of barriers among warpgroups.
constexpr u32 GATHER_FULL = 1, PART_WRITTEN = 2, PART_KNOWN = 3;

// Whether there are registers to spare for scale and bias of channels while the last products run.
constexpr bool EARLY = !SPLITS && BLOCKS * TOKENS <= 384;

// A warpgroup that multiplies may need more registers than an even share, one that loads needs few.
constexpr bool UNEVEN = GROUPS == 2 && BLOCKS * TOKENS >= 128;

struct Sums {
  u32 of[BLOCKS][SUMS];
};

struct Shape {
  int tokens, channels, steps, panels;
  int weight_tiles, token_tiles, group;
  int whole, splits;  // tiles that are not split, and into how many parts of K' the others are
  int ranges;         // or, if not 0: how many equal parts all channels' K' are cut into
};

// What a block works on at a time: a tile, or a part of its K'.
struct Item {
  int weight_tile, token_tile;
  int first, count;  // steps of 256 bytes of K'
  // Of a tile that blocks share: which of how many parts this is, its counters, and where parts lie: the
  // first, the second, and how far it is from there to the next.
  int part, parts;
  int counter, first_slot, second_slot, slot_step;
};

// Ranges are of `length` steps, the first `longer` of them of one more.
struct Ranges {
  u32 length, longer;
};
SS_DEVICE Ranges ranges_of(const Shape& shape) {
  const u32 all = static_cast<u32>(shape.weight_tiles) * shape.steps, ranges = shape.ranges;
  return Ranges{all / ranges, all % ranges};
}
SS_DEVICE u32 begin_of_range(const Ranges& ranges, u32 range) {
  return range * ranges.length + (range < ranges.longer ? range : ranges.longer);
}
SS_DEVICE u32 range_of_step(const Ranges& ranges, u32 step) {
  const u32 in_longer = ranges.longer * (ranges.length + 1);
  return step < in_longer ? step / (ranges.length + 1) : ranges.longer + (step - in_longer) / ranges.length;
}

// Equal parts: the K' of all tiles of channels, one after the other, is cut into ranges.  A block has one
// of them for one tile of tokens; neighbours have the same one, so that weights come from L2 for all but
// the first of them.
SS_DEVICE Item item_of_range(int number, const Shape& shape) {
  const Ranges ranges = ranges_of(shape);
  const u32 tiles = shape.token_tiles, steps = shape.steps;
  const u32 range = blockIdx.x / tiles, token_tile = blockIdx.x - range * tiles;
  const u32 begin = begin_of_range(ranges, range), end = begin_of_range(ranges, range + 1);
  const u32 tile = begin / steps + number, from = tile * steps, to = from + steps;
  const u32 first_range = range_of_step(ranges, from), last_range = range_of_step(ranges, to - 1);
  Item item;
  item.weight_tile = tile, item.token_tile = token_tile;
  item.first = begin > from ? begin - from : 0;
  item.count = (end < to ? end : to) - from - item.first;
  item.part = range - first_range, item.parts = last_range - first_range + 1;
  // A block shares at most the first and the last of its tiles: two slots each.
  item.counter = first_range * tiles + token_tile;
  item.first_slot = 2 * item.counter + 1;
  item.second_slot = 2 * (item.counter + tiles), item.slot_step = 2 * tiles;
  return item;
}

// Whole tiles, then the parts of the others.  Tiles are numbered `group` weight tiles wide, all token
// tiles deep, so that what runs at a time shares both operands in L2; blocks read the same parts of K' at
// about the same time for the same reason.
SS_DEVICE Item item_of_tile(int number, const Shape& shape) {
  const int index = blockIdx.x + number * gridDim.x;
  Item item;
  int tile = index;
  item.first = 0, item.count = shape.steps, item.part = 0, item.parts = 1;
  item.counter = 0, item.first_slot = 0, item.second_slot = 0, item.slot_step = 1;
  if constexpr (SPLITS) {
    if (index >= shape.whole) {
      const int part = index - shape.whole;
      item.counter = part / shape.splits;
      item.part = part - item.counter * shape.splits, item.parts = shape.splits;
      item.first_slot = item.counter * shape.splits, item.second_slot = item.first_slot + 1;
      tile = shape.whole + item.counter;
      item.first = static_cast<int>(static_cast<u32>(shape.steps) * item.part / shape.splits);
      item.count = static_cast<int>(static_cast<u32>(shape.steps) * (item.part + 1) / shape.splits) - item.first;
    }
  }
  const int of_group = shape.group * shape.token_tiles;
  const int which = tile / of_group, rest = tile - which * of_group;
  const int first = which * shape.group;
  const int width = shape.weight_tiles - first < shape.group ? shape.weight_tiles - first : shape.group;
  item.token_tile = rest / width;
  item.weight_tile = first + rest - item.token_tile * width;
  return item;
}

// What this block does as number `number`.
SS_DEVICE Item item_of(int number, const Shape& shape) {
  if (SPLITS && shape.ranges) return item_of_range(number, shape);
  return item_of_tile(number, shape);
}

// How many items this block has.
SS_DEVICE int items_of(const Shape& shape) {
  if (SPLITS && shape.ranges) {
    const Ranges ranges = ranges_of(shape);
    const u32 range = blockIdx.x / shape.token_tiles, steps = shape.steps;
    return (begin_of_range(ranges, range + 1) - 1) / steps - begin_of_range(ranges, range) / steps + 1;
  }
  const int tiles = shape.weight_tiles * shape.token_tiles;
  const int items = SPLITS ? shape.whole + (tiles - shape.whole) * shape.splits : tiles;
  return (items - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
}

// The first of a warpgroup's blocks of 64 channels.
SS_DEVICE int block_of(const Item& item, int group) {
  return (K_GROUPS ? item.weight_tile : item.weight_tile * GROUPS + group) * BLOCKS;
}

// --- loading --------------------------------------------------------------------------------------

SS_DEVICE void load_weights(const u8* packed, const Shape& shape, const Item& item, int stage, u32 target,
                            u32 barrier) {
  constexpr int TOGETHER = UNITS > 2 ? 2 : UNITS;  // units side by side in memory
#pragma unroll
  for (int unit = 0; unit < UNITS; unit += TOGETHER) {
    const int block = item.weight_tile * UNITS + unit;
    // Channels beyond the last panel are multiplied by its weights, and not stored.
    const int panel = block / 2 < shape.panels ? block / 2 : shape.panels - 1;
    const i64 number = (panel * static_cast<i64>(shape.steps * 2) + stage) * 2 + (block & 1);
    copy_bytes(target + TOKEN_BYTES + unit * UNIT, packed + number * UNIT, TOGETHER * UNIT, barrier);
  }
}

SS_DEVICE void load_stages(const TensorMap* map, const u8* packed, const Shape& shape, bool early, u32 stages,
                           u32 full, u32 empty) {
  const int items = items_of(shape);
  // The weights of the first stages before the kernel that writes the tokens is over.  Where it is over
  // anyway, the first products would wait for all of them.
  const Item first = item_of(0, shape);
  const int most = early ? STAGES : 0, ready = 2 * first.count < most ? 2 * first.count : most;
  for (int slot = 0; slot < ready; ++slot) {
    barrier_arrive_for_bytes(full + 8 * slot, TOKEN_BYTES + UNITS * UNIT);
    load_weights(packed, shape, first, 2 * first.first + slot, stages + slot * STAGE_BYTES, full + 8 * slot);
  }
  wait_for_launch_before();
  for (int slot = 0; slot < ready; ++slot) {
    copy_box(stages + slot * STAGE_BYTES, map, (2 * first.first + slot) * 128, first.token_tile * TOKENS,
             full + 8 * slot);
  }
  u32 position = ready;
  int done = ready;  // stages of the item that are under way already
  for (int number = 0; number < items; ++number, done = 0) {
    const Item item = item_of(number, shape);
    for (int stage = 2 * item.first + done; stage < 2 * (item.first + item.count); ++stage, ++position) {
      const u32 slot = position % STAGES, round = position / STAGES;
      const u32 barrier = full + 8 * slot, target = stages + slot * STAGE_BYTES;
      barrier_wait(empty + 8 * slot, (round & 1) ^ 1);
      barrier_arrive_for_bytes(barrier, TOKEN_BYTES + UNITS * UNIT);
      copy_box(target, map, stage * 128, item.token_tile * TOKENS, barrier);
      load_weights(packed, shape, item, stage, target, barrier);
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

// One lane of each warp says that all are done with a stage; or each does, for tools that do not see
// that lanes meet before.
SS_DEVICE void release_stage(u32 empty) {
  __syncwarp();
  if (EACH_LANE || (threadIdx.x & 31) == 0) barrier_arrive(empty);
}

SS_DEVICE u32 plus(u32 a, u32 b) { return INTEGER ? a + b : as_bits(add(as_float(a), as_float(b))); }

// Warpgroups that took turns at K': the first gets the sum, in the order of the warpgroups.  `free`: a
// barrier at which it says that it has read `buffer`; `round` counts the tiles.
SS_DEVICE void gather_groups(Sums& sums, int group, int thread, u32 buffer, u32 free, u32 round) {
  constexpr u32 ALL = GROUPS * GROUP_THREADS;
  if (group > 0) {
    if (round) barrier_wait(free, (round - 1) & 1);
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
  barrier_arrive(free);
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

SS_DEVICE Target target_of(const Item& item, int group, int warp, u32 own_scales, u32 own_buffers,
                           const Shape& shape) {
  const int lane = threadIdx.x & 31;
  Target target;
  target.first_token = item.token_tile * TOKENS, target.token = target.first_token + 2 * (lane & 3);
  target.first_channel = first_channel_of(item, group, warp);
  target.channel = target.first_channel + own_channel(item, group);
  target.left = shape.channels - target.channel;
  target.scales = own_scales + 8 * (lane & 3), target.buffers = own_buffers;
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

// --- tiles that blocks share ----------------------------------------------------------------------

// A tile is added up and written in slices of so many times eight tokens.
constexpr int SLICE = K_GROUPS && TOKENS >= 32 ? 4 : 2, SLICES = TOKENS / (8 * SLICE);
// Pieces of 16 bytes of sums that a thread writes, the warpgroups that do, and so the pieces of a part.
constexpr int PIECES = BLOCKS * SUMS / 4;
constexpr int WORKERS = K_GROUPS ? 1 : GROUPS;
constexpr i64 OF_PART = static_cast<i64>(WORKERS) * PIECES * GROUP_THREADS;
// How often a block looks whether the others have come, about 10 us.  It must not wait for ever: they may
// get a multiprocessor only when this block leaves one.
constexpr int PATIENCE = 32;

// Where this thread's pieces of a part begin.
SS_DEVICE uint4* part_of(uint4* partials, const Item& item, int part, int group, int thread) {
  const int slot = part ? item.second_slot + (part - 1) * item.slot_step : item.first_slot;
  return partials + slot * OF_PART + group * PIECES * GROUP_THREADS + thread;
}

SS_DEVICE void add_piece(u32* four, const uint4* piece) {
  const uint4 part = load_shared_by_blocks(piece);
  four[0] = plus(four[0], part.x), four[1] = plus(four[1], part.y);
  four[2] = plus(four[2], part.z), four[3] = plus(four[3], part.w);
}

// One slice, added up in the order of K'.
template <bool VECTOR>
SS_DEVICE void write_slice(uint4* partials, const Item& item, int group, int thread, int slice,
                           const Channels& channels, const Target& target, const Shape& shape,
                           const Epilogue& to) {
  Quads sums[SLICE] = {};
#pragma unroll 4
  for (int part = 0; part < item.parts; ++part) {
    const uint4* const theirs = part_of(partials, item, part, group, thread);
#pragma unroll
    for (int i = 0; i < SLICE * BLOCKS; ++i) {
      const int piece = i / SLICE * (PIECES / BLOCKS) + SLICE * slice + i % SLICE;
      add_piece(sums[i % SLICE].of[i / SLICE], theirs + piece * GROUP_THREADS);
    }
  }
  const i64 row_bytes = to.out_stride * OUT_BYTES;
#pragma unroll
  for (int j = 0; j < SLICE; ++j) {
    const int column = SLICE * slice + j, token = target.token + 8 * column;
    store_two<VECTOR>(sums[j], channels, target.scales + 32 * column,
                      to.out + token * row_bytes + static_cast<i64>(target.channel) * OUT_BYTES, row_bytes,
                      target.left, shape.tokens - token);
  }
}

// Blocks that share a tile: each leaves its part of the sums in `partials` and counts itself.  All parts
// there, the tile is dealt out in as many shares as there are blocks: to those that waited, and to the
// last to come, who may find nobody else.  Who has more to do (`more`) does not wait.  Returns true
// where `sums` has become the sum of two parts, to be written as a tile of one's own.
//
// `counters`: of the tile, how many came, how many shares are dealt out, how many left; all zero again
// afterwards.
SS_DEVICE bool share_tile(Sums& sums, const Channels& channels, const Item& item, const Target& target,
                          bool more, int group, int thread, const Shape& shape, const Epilogue& to,
                          uint4* partials, u32* counters, volatile u32* told) {
  constexpr u32 ALL = WORKERS * GROUP_THREADS, NO_LIMIT = 0xffffffffu;
  const u32 parts = item.parts;
  u32* const counts = counters + 3 * item.counter;
  const bool speaker = group == 0 && thread == 0;
  if (!K_GROUPS && item.part == 0 && parts == 2) {
    // If the other is there already, as a rule where ranges are longer than tiles, nothing need be written.
    if (speaker) *told = load_counter(counts);
    named_barrier(PART_KNOWN, ALL);
    const bool there = *told == 1;
    if (there) {
      const uint4* const theirs = part_of(partials, item, 1, group, thread);
#pragma unroll
      for (int i = 0; i < PIECES; ++i) add_piece(sums.of[4 * i / SUMS] + 4 * i % SUMS, theirs + i * GROUP_THREADS);
    }
    named_barrier(PART_WRITTEN, ALL);
    if (there) {
      if (speaker) {
        // Nothing is left to be dealt out when the other, if it still waits, sees that all came.
        atomic_next(counts + 1, NO_LIMIT), atomic_next(counts + 1, NO_LIMIT);
        atomic_next(counts, NO_LIMIT);
        if (atomic_next(counts + 2, 1) == 1) counts[0] = counts[1] = 0;
      }
      __syncwarp();
      return true;
    }
  }
  uint4* const own = part_of(partials, item, item.part, group, thread);
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u32* const four = sums.of[4 * i / SUMS] + 4 * i % SUMS;
    own[i * GROUP_THREADS] = make_uint4(four[0], four[1], four[2], four[3]);
  }
  named_barrier(PART_WRITTEN, ALL);
  // Low tiles are not worth dealing out: they are one share, for the last to come.
  const u32 shares = K_GROUPS ? 1 : parts;
  u32 share = shares;  // none
  if (speaker) {
    // After everything that the barrier made this thread see, and before what it lets others do.
    u32 come = atomic_next(counts, NO_LIMIT) + 1;
    if constexpr (K_GROUPS) {
      if (come == parts) share = 0;
    } else {
      for (int look = more ? PATIENCE : 0; come < parts && look < PATIENCE; ++look) come = load_counter(counts);
      if (come == parts) share = atomic_next(counts + 1, NO_LIMIT);
    }
  }
  const int each = (SLICES + static_cast<int>(shares) - 1) / static_cast<int>(shares);
#pragma unroll 1
  while (true) {
    if (speaker) *told = share;
    named_barrier(PART_KNOWN, ALL);
    const u32 mine = *told;
    if (mine >= shares) break;
    if (speaker) share = K_GROUPS ? shares : atomic_next(counts + 1, NO_LIMIT);
    const int first = static_cast<int>(mine) * each;
#pragma unroll 1
    for (int slice = first; slice < first + each && slice < SLICES; ++slice) {
      if (stores_vectors(target, to)) {
        write_slice<true>(partials, item, group, thread, slice, channels, target, shape, to);
      } else if (target.left > 0) {
        write_slice<false>(partials, item, group, thread, slice, channels, target, shape, to);
      }
    }
    __syncwarp();  // a warp comes to a barrier as one
    named_barrier(PART_WRITTEN, ALL);
  }
  // Nobody of this block reads parts any more.  The last to leave clears the counters, at once, so that
  // launches that should not have met leave no trace.
  if (speaker && atomic_next(counts + 2, parts - 1) == parts - 1) counts[0] = counts[1] = 0;
  __syncwarp();
  return false;
}

// --- the kernel -----------------------------------------------------------------------------------

SS_KERNEL((GROUPS + 1) * GROUP_THREADS, 1)
hopper_gemm(const __grid_constant__ TensorMap token_map, const __grid_constant__ TensorMap out_map,
            const u8* packed, const float* token_scales, const float* channel_scales, const float* bias,
            u8* out, i64 out_stride, uint4* partials, u32* counters, int tokens, int channels, int steps,
            int panels, int weight_tiles, int token_tiles, int tile_group, int whole, int splits, int ranges,
            int early, int storing) {
  SS_ALIGNED_STAGE(shared);
  const u32 stages = shared_address(shared);
  const u32 full = stages + BARRIERS, empty = full + 8 * STAGES;
  const u32 gather_free = empty + 8 * STAGES;
  u32* const told = reinterpret_cast<u32*>(shared + BARRIERS + 16 * STAGES + 8);
  const Shape shape{tokens,      channels,   steps, panels, weight_tiles,
                    token_tiles, tile_group, whole, splits, ranges};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(full + 8 * slot, 1);
      barrier_init(empty + 8 * slot, (EACH_LANE ? 128 : 4) * (K_GROUPS ? 1 : GROUPS));
    }
    if (K_GROUPS) barrier_init(gather_free, GROUP_THREADS);
    barrier_init_done();
  }
  __syncthreads();

  // The same for all threads of a warp, and known to be: products need it.
  const int of_all = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = of_all / 4, warp = of_all % 4;
  if (group == GROUPS) {
    if constexpr (UNEVEN) give_registers<24>();
    if (threadIdx.x == GROUPS * GROUP_THREADS) load_stages(&token_map, packed, shape, early, stages, full, empty);
    return;
  }
  if constexpr (UNEVEN) take_registers<240>();
  wait_for_launch_before();
  const int thread = threadIdx.x % GROUP_THREADS;
  const Epilogue to{token_scales, channel_scales, bias, out, out_stride, &out_map, storing};
  const u32 turn = K_GROUPS ? group : 0;
  const u32 own_units = TOKEN_BYTES + (K_GROUPS ? 0 : group * BLOCKS * UNIT);
  const u32 own_scales = stages + SCALES + of_all * (TOKENS * 4);
  const u32 own_buffers = stages + RESULTS + of_all * (2 * BOX_BYTES);
  u32 position = 0;  // stages of all former items
  Sums sums;
  // Fetched one product ahead; products in flight read theirs.
  u32 metadata[4];
  static_assert(IN_FLIGHT + 2 <= 4, "a product's metadata must not be overwritten");

  const int items = items_of(shape);
#pragma unroll 1
  for (int number = 0; number < items; ++number) {
    const int of_item = item_of(number, shape).count;
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
          // Of the former stage no product is in flight any more, and no lane reads metadata.
          if (p == IN_FLIGHT - 1 && (stage || step)) release_stage(empty + 8 * before);
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
    const Item item = item_of(opaque(number), shape);
    const Target target = target_of(item, group, warp, own_scales, own_buffers, shape);
    // What comes from far away, while the last products run.
    fetch_scales(own_scales, token_scales, target.first_token, tokens);
    Channels held;
    if constexpr (EARLY) held = channels_of(to, target.channel, target.left);
    products_wait<0>();
    release_stage(empty + 8 * before);
    position += 2 * of_item;

    if constexpr (K_GROUPS) gather_groups(sums, group, thread, stages + GATHER, gather_free, number);
    if (!K_GROUPS || group == 0) {
      if constexpr (!EARLY) held = channels_of(to, target.channel, target.left);
      bool mine = true;
      if (SPLITS && item.parts > 1) {
        mine = share_tile(sums, held, item, target, number + 1 < items, K_GROUPS ? 0 : group, thread, shape,
                          to, partials, counters, told);
      }
      if (mine) write_tile(sums, held, target, shape, to);
    }
  }
  // Shared memory must outlive the stores that read it.
  if (BOXES && (thread & 31) == 0) stores_wait_read<0>();
}
