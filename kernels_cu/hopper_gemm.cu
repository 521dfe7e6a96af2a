// Sparse GEMM for Hopper (sm_90a): y = cast((single(W' x') * s_m) * s_n + bias), one pass.
//
// docs/hopper-kernel.md has the picture, the budget of bytes and cycles, and what was tried.
//
// A block stays on its multiprocessor and works through tiles of ROWS output channels times TOKENS
// tokens.  Its last warpgroup loads: one thread asks the copy engine for the tokens, STAGES stages of
// 128 bytes of K' ahead.  The other GROUPS warpgroups multiply: each has BLOCKS blocks of 64 channels.
// The weights never see shared memory: they are packed in the order of the registers of the tensor
// cores' sparse operand, and a thread loads its own 16 bytes straight from L2, three products ahead.
//
// K' is walked in steps of 256 bytes: two stages, four products ("quarters") of 64 bytes each.
//
// Packed weights (hopper_pack.cu): panels of 128 channels; a panel has for every stage of 128 bytes two
// units, one for each block of 64 channels; a unit is 128 threads x 16 bytes for the first 64 bytes of
// K', the same for the second, then the metadata, a word a thread: one each for the two halves (8-bit
// types) or one for both (16-bit types).  Row r = 16 * warp + g + 8 * h of block m of a panel is channel
// 32 * warp + 4 * g + 2 * m + h of it: so the four (or two) channels that a thread gets of a token lie
// side by side, and results are stored without passing through shared memory.
//
// SS_KGROUPS: the warpgroups have the same channels and take turns at the steps of K'; their sums meet
// in shared memory.  splits > 1: several blocks share a tile, each with a part of K'; their sums meet
// in `partials`, added by the last to finish, in the order of K': repeated runs give the same bits.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_TYPE     int8, E4M3, bfloat16 or float16 (numbers.cuh); SS_OUT float32, float16, bfloat16
//   SS_TOKENS   tokens of a tile; SS_BLOCKS blocks of 64 channels of a warpgroup, 1 or 2
//   SS_GROUPS   warpgroups that multiply; SS_KGROUPS as above; SS_STAGES stages
#include "hopper.cuh"
#include "wgmma_sparse.cuh"

constexpr int TOKENS = SS_TOKENS, BLOCKS = SS_BLOCKS, GROUPS = SS_GROUPS, STAGES = SS_STAGES;
constexpr bool K_GROUPS = SS_KGROUPS;
constexpr int GROUP_THREADS = 128;
// Where products take weights from.
constexpr int FROM_DEVICE = 0, FROM_SHARED = 1, IN_SHARED = 2;
constexpr int SOURCE = SS_SOURCE;
constexpr bool SHARED = SOURCE != FROM_DEVICE;
constexpr int HALF_BYTES = GROUP_THREADS * 16;
constexpr bool WIDE = bytes_of(SS_TYPE) == 2;
constexpr int UNIT = 2 * HALF_BYTES + GROUP_THREADS * (WIDE ? 4 : 8);
constexpr int STEP_BYTES = 2 * 2 * UNIT;
// Shared memory of a stage: tokens, and the units of all warpgroups that work on it at a time.
constexpr int TOKEN_BYTES = TOKENS * 128;
constexpr int UNITS = BLOCKS * (K_GROUPS ? 1 : GROUPS);
constexpr int STAGE_BYTES = TOKEN_BYTES + (SHARED ? (UNITS * UNIT + 1023) / 1024 * 1024 : 0);
constexpr int SUMS = TOKENS / 2;
constexpr bool INTEGER = SS_TYPE == SS_S8;
constexpr int OUT_BYTES = bytes_of(SS_OUT);
// A warpgroup that multiplies needs more registers than an even share, one that loads needs few.
constexpr bool UNEVEN = GROUPS == 2 && BLOCKS * TOKENS >= 128;

struct Sums {
  u32 of[BLOCKS][SUMS];
};

// A stage is 2 * BLOCKS products: for each half of its 128 bytes of K', one for each block.
constexpr int PRODUCTS = 2 * BLOCKS;
// One thread's part of the weights of one product.
struct Weights {
  uint4 values;
  u32 metadata;
};

// Which part of the product a block works on.
struct Item {
  int weight_tile, token_tile, split;
  int first, count;  // steps of K'
};

struct Shape {
  int tokens, channels, steps, panels;
  int weight_tiles, token_tiles, group, splits;
};

// Items in the order in which blocks take them: `group` weight tiles wide, all token tiles deep, so
// that what runs at a time shares both operands in L2.
SS_DEVICE Item item_of(int index, const Shape& shape) {
  Item item;
  const int tile = SS_SPLITS ? index / shape.splits : index;
  item.split = index - tile * shape.splits;
  const int of_group = shape.group * shape.token_tiles;
  const int which = tile / of_group, rest = tile - which * of_group;
  const int first = which * shape.group;
  const int width = shape.weight_tiles - first < shape.group ? shape.weight_tiles - first : shape.group;
  item.token_tile = rest / width;
  item.weight_tile = first + rest - item.token_tile * width;
  item.first = static_cast<int>(static_cast<i64>(shape.steps) * item.split / shape.splits);
  item.count = static_cast<int>(static_cast<i64>(shape.steps) * (item.split + 1) / shape.splits) - item.first;
  if constexpr (!SS_SPLITS) item.first = 0, item.count = shape.steps;
  return item;
}

SS_DEVICE int items_of(const Shape& shape) {
  return shape.weight_tiles * shape.token_tiles * (SS_SPLITS ? shape.splits : 1);
}

// The first of a warpgroup's blocks of 64 channels.
SS_DEVICE int block_of(const Item& item, int group) {
  return (K_GROUPS ? item.weight_tile : item.weight_tile * GROUPS + group) * BLOCKS;
}

// Where a warpgroup's weights of an item start.
SS_DEVICE const u8* weights_of(const u8* weights, const Item& item, int group, const Shape& shape) {
  const int block = block_of(item, group);
  const int panel = block / 2 < shape.panels ? block / 2 : shape.panels - 1;
  const int step = item.first + (K_GROUPS ? group : 0);
  return weights + (static_cast<i64>(panel) * shape.steps + step) * STEP_BYTES + (block & 1) * UNIT;
}

constexpr int METADATA_STEP = WIDE ? 0 : GROUP_THREADS * 4;

// A stage's weights straight from device memory.
SS_DEVICE void load_stage(Weights (&held)[4], const u8* stage, int thread) {
#pragma unroll
  for (int p = 0; p < PRODUCTS; ++p) {
    const int half = p / BLOCKS;
    const u8* const unit = stage + p % BLOCKS * UNIT;
    load_weights(held[p].values, unit + half * HALF_BYTES + thread * 16);
    load_weights(held[p].metadata, unit + 2 * HALF_BYTES + half * METADATA_STEP + thread * 4);
  }
}

// What product `p` of a stage needs in registers, from shared memory.
SS_DEVICE void fetch(Weights& held, u32 units, int p, int thread) {
  const int half = p / BLOCKS;
  const u32 unit = units + p % BLOCKS * UNIT;
  if (SOURCE == FROM_SHARED) held.values = shared_load16(unit + half * HALF_BYTES + thread * 16);
  held.metadata = shared_load4(unit + 2 * HALF_BYTES + half * METADATA_STEP + thread * 4);
}

// Start product `p` of a stage.  Arguments are constants once the loops around it are unrolled.
SS_DEVICE void start_product(Sums& sums, const Weights& held, u32 tokens, u32 units, int p) {
  const int half = p / BLOCKS, selector = WIDE ? half : 0;
  const u64 descriptor = rows_of_128(tokens) + 4 * half;
  products_fence();
  if constexpr (SOURCE == IN_SHARED) {
    const u64 weights = rows_of_64(units + p % BLOCKS * UNIT) + 2 * half;
    multiply(sums.of[p % BLOCKS], weights, descriptor, held.metadata, selector);
  } else {
    multiply(sums.of[p % BLOCKS], held.values, descriptor, held.metadata, selector);
  }
  products_commit();
}

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

struct Epilogue {
  const float* token_scales;
  const float* channel_scales;
  const float* bias;
  u8* out;
  i64 out_stride;  // elements
  int vector;      // whether four channels of a token can be stored at once
};

SS_DEVICE float finish(u32 sum, float token, float channel, float offset) {
  const float value = INTEGER ? from_int(static_cast<int>(sum)) : as_float(sum);
  return add(mul(mul(value, token), channel), offset);
}

// The side-by-side channels of one token that a thread has, at once.
SS_DEVICE void store_channels(u8* out, const float (&v)[2 * BLOCKS]) {
  u32 word[BLOCKS * OUT_BYTES / 2];
#pragma unroll
  for (int c = 0; c < 2 * BLOCKS; c += 2) {
    if constexpr (SS_OUT == SS_F32) {
      word[c] = as_bits(v[c]), word[c + 1] = as_bits(v[c + 1]);
    } else {
      word[c / 2] = pack16<SS_OUT == SS_F16 ? SS_F16 : SS_BF16>(v[c], v[c + 1]);
    }
  }
  if constexpr (BLOCKS * OUT_BYTES == 8) {
    store_result(out, make_uint4(word[0], word[1], word[2], word[3]));
  } else if constexpr (BLOCKS * OUT_BYTES == 4) {
    store_result(out, make_uint2(word[0], word[1]));
  } else {
    store_result(out, word[0]);
  }
}

// The first `left` of them, one by one.
SS_DEVICE void store_some(u8* out, const float (&v)[2 * BLOCKS], int left) {
#pragma unroll
  for (int c = 0; c < 2 * BLOCKS; ++c) {
    if (c >= left) break;
    if constexpr (SS_OUT == SS_F32) {
      reinterpret_cast<u32*>(out)[c] = as_bits(v[c]);
    } else {
      reinterpret_cast<u16*>(out)[c] =
          static_cast<u16>(pack16<SS_OUT == SS_F16 ? SS_F16 : SS_BF16>(v[c], 0.0f));
    }
  }
}

// VECTOR: all of a thread's channels exist, and a token's can be stored at once.
template <bool VECTOR>
SS_DEVICE void write_tokens(const Sums& sums, u32 scales, int first, int channel, int left,
                            const Shape& shape, const Epilogue& to) {
  float scale[2 * BLOCKS], offset[2 * BLOCKS];
#pragma unroll
  for (int c = 0; c < 2 * BLOCKS; ++c) {
    const bool inside = VECTOR || c < left;
    scale[c] = to.channel_scales && inside ? to.channel_scales[channel + c] : 1.0f;
    offset[c] = to.bias && inside ? to.bias[channel + c] : -0.0f;
  }
  const i64 row_bytes = to.out_stride * OUT_BYTES;
  u8* out = to.out + first * row_bytes + static_cast<i64>(channel) * OUT_BYTES;
  int rest = shape.tokens - first;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j) {
    const uint2 pair = shared_load8(scales + 32 * j);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float of_token = as_float(e ? pair.y : pair.x);
      float v[2 * BLOCKS];
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          v[2 * m + h] =
              finish(sums.of[m][4 * j + 2 * h + e], of_token, scale[2 * m + h], offset[2 * m + h]);
        }
      }
      if (e < rest) {
        if constexpr (VECTOR) {
          store_channels(out + e * row_bytes, v);
        } else {
          store_some(out + e * row_bytes, v, left);
        }
      }
    }
    rest -= 8;
    out += 8 * row_bytes;
  }
}

// `buffer`: shared memory of this warp for the scales of its tokens.
SS_DEVICE void write_tile(const Sums& sums, const TokenScales& held, u32 buffer, const Item& item,
                          int group, int thread, const Shape& shape, const Epilogue& to) {
  const int lane = thread & 31, warp = thread >> 5;
  const int block = block_of(item, group);
  const int channel = block / 2 * 128 + 32 * warp + 4 * (lane >> 2) + 2 * (block & 1);
  const int left = shape.channels - channel;
  const int first = item.token_tile * TOKENS + 2 * (lane & 3);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (TOKENS + 31) / 32; ++i) {
    if (TOKENS % 32 == 0 || 32 * i + lane < TOKENS) {
      shared_store4(buffer + (32 * i + lane) * 4, as_bits(held.of[i]));
    }
  }
  __syncwarp();
  const u32 scales = buffer + 8 * (lane & 3);
  if (left <= 0) return;
  if (to.vector && left >= 2 * BLOCKS) {
    write_tokens<true>(sums, scales, first, channel, left, shape, to);
  } else {
    write_tokens<false>(sums, scales, first, channel, left, shape, to);
  }
}

SS_DEVICE u32 plus(u32 a, u32 b) { return INTEGER ? a + b : as_bits(add(as_float(a), as_float(b))); }

// Warpgroups that took turns at K': the first gets the sum, in the order of the warpgroups.
SS_DEVICE void gather_groups(Sums& sums, int group, int thread, u32 buffer, bool fresh, bool more) {
  constexpr u32 FULL = 1, FREE = 2, ALL = GROUPS * GROUP_THREADS;
  if (group > 0) {
    if (!fresh) named_barrier(FREE, ALL);
    const u32 mine = buffer + (group - 1) * BLOCKS * SUMS * GROUP_THREADS * 4 + thread * 4;
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) {
      shared_store4(mine + i * GROUP_THREADS * 4, sums.of[i / SUMS][i % SUMS]);
    }
    named_barrier(FULL, ALL);
    return;
  }
  named_barrier(FULL, ALL);
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
  if (more) named_barrier_arrive(FREE, ALL);
}

// Blocks that shared a tile: true for the last one, which gets the sum, in the order of K'.
SS_DEVICE bool gather_splits(Sums& sums, const Item& item, int group, int thread, const Shape& shape,
                             u32* partials, u32* arrived, u32* last) {
  constexpr int WORKERS = K_GROUPS ? 1 : GROUPS;
  constexpr int OF_GROUP = BLOCKS * SUMS * GROUP_THREADS;
  const i64 tile = static_cast<i64>(item.token_tile) * shape.weight_tiles + item.weight_tile;
  u32* const of_tile = partials + tile * shape.splits * (WORKERS * OF_GROUP) + group * OF_GROUP + thread;
  u32* const mine = of_tile + item.split * static_cast<i64>(WORKERS * OF_GROUP);
#pragma unroll
  for (int i = 0; i < BLOCKS * SUMS; ++i) mine[i * GROUP_THREADS] = sums.of[i / SUMS][i % SUMS];
  fence_device();
  constexpr u32 WRITTEN = 3, KNOWN = 4;
  named_barrier(WRITTEN, WORKERS * GROUP_THREADS);
  if (group == 0 && thread == 0) {
    const u32 before = atomic_next(arrived + tile);
    *last = before + 1 == static_cast<u32>(shape.splits);
    if (*last) arrived[tile] = 0;
  }
  named_barrier(KNOWN, WORKERS * GROUP_THREADS);
  if (!*last) return false;
  fence_device();
#pragma unroll 1
  for (int split = 0; split < shape.splits; ++split) {
    const u32* const theirs = of_tile + split * static_cast<i64>(WORKERS * OF_GROUP);
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) {
      u32& sum = sums.of[i / SUMS][i % SUMS];
      const u32 part = load_shared_by_blocks(theirs + i * GROUP_THREADS);
      sum = split ? plus(sum, part) : part;
    }
  }
  return true;
}

SS_DEVICE void load_stages(const TensorMap* map, const u8* packed, const Shape& shape, u32 stages, u32 full,
                          u32 empty) {
  u32 position = 0;
  const int items = items_of(shape);
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item = item_of(index, shape);
    for (int stage = 2 * item.first; stage < 2 * (item.first + item.count); ++stage, ++position) {
      const u32 slot = position % STAGES, round = position / STAGES;
      const u32 barrier = full + 8 * slot, target = stages + slot * STAGE_BYTES;
      barrier_wait(empty + 8 * slot, (round & 1) ^ 1);
#ifdef SS_NOLOAD
      barrier_arrive(barrier);
      continue;
#endif
      barrier_arrive_for_bytes(barrier, TOKEN_BYTES + (SHARED ? UNITS * UNIT : 0));
      copy_box(target, map, stage * 128, item.token_tile * TOKENS, barrier);
      if constexpr (SHARED) {
        constexpr int TOGETHER = UNITS > 2 ? 2 : UNITS;  // units side by side in memory
#pragma unroll
        for (int unit = 0; unit < UNITS; unit += TOGETHER) {
          const int block = item.weight_tile * UNITS + unit;
          const int panel = block / 2 < shape.panels ? block / 2 : shape.panels - 1;
          const u8* const from =
              packed + ((panel * static_cast<i64>(shape.steps * 2) + stage) * 2 + (block & 1)) * UNIT;
          copy_bytes(target + TOKEN_BYTES + unit * UNIT, from, TOGETHER * UNIT, barrier);
        }
      }
    }
  }
}

SS_KERNEL((GROUPS + 1) * GROUP_THREADS, 1)
hopper_gemm(const __grid_constant__ TensorMap map, const u8* packed, const float* token_scales,
            const float* channel_scales, const float* bias, u8* out, i64 out_stride, u32* partials,
            u32* arrived, int tokens, int channels, int steps, int panels, int weight_tiles,
            int token_tiles, int tile_group, int splits, int vector) {
  // Stages, scales of tokens for each warp, sums of warpgroups, barriers, whether this block is last.
  SS_ALIGNED_STAGE(shared);
  constexpr int SCALES = STAGES * STAGE_BYTES, GATHER = SCALES + GROUPS * 4 * TOKENS * 4;
  constexpr int BARRIERS = GATHER + (K_GROUPS ? (GROUPS - 1) * BLOCKS * SUMS * GROUP_THREADS * 4 : 0);
  const u32 stages = shared_address(shared);
  const u32 full = stages + BARRIERS, empty = full + 8 * STAGES;
  u32* const last = reinterpret_cast<u32*>(shared + BARRIERS + 16 * STAGES);
  const Shape shape{tokens, channels, steps, panels, weight_tiles, token_tiles, tile_group, splits};
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
    if (threadIdx.x == GROUPS * GROUP_THREADS) load_stages(&map, packed, shape, stages, full, empty);
    return;
  }
  if constexpr (UNEVEN) take_registers<240>();
  const int thread = threadIdx.x % GROUP_THREADS;
  const bool speaks = (thread & 31) == 0;
  const Epilogue to{token_scales, channel_scales, bias, out, out_stride, vector};
  constexpr int TURNS = K_GROUPS ? GROUPS : 1;  // of how many steps this warpgroup takes one
  const u32 turn = K_GROUPS ? group : 0;
  u32 position = 0;  // stages of all former items
  Sums sums;
  const u32 scale_buffer = stages + SCALES + threadIdx.x / 32 * (TOKENS * 4);
  // Loads into operands of products share one scoreboard, so a product waits for all of them: what
  // comes from device memory is loaded a stage at a time, a stage ahead.  From shared memory the next
  // product's part is fetched while two are under way.
  Weights held[2][4];

  int index = blockIdx.x;
  const u8* here = nullptr;
  if constexpr (!SHARED) {
    here = weights_of(packed, item_of(index, shape), group, shape);
    load_stage(held[0], here, thread);
  }
  bool fresh = true;
#pragma unroll 1
  while (true) {
    const bool more = index + static_cast<int>(gridDim.x) < items_of(shape);
    const u8* upcoming = here;
    if (!SHARED && more) upcoming = weights_of(packed, item_of(index + gridDim.x, shape), group, shape);
    const int of_item = item_of(index, shape).count;
    const int count = (of_item - static_cast<int>(turn) + TURNS - 1) / TURNS;
    u32 at = position + 2 * turn;
    // Rather than telling the first products to ignore what the registers hold: older compilers (CUDA
    // 12.8) then see registers of a product in flight defined, and serialise all products.
#pragma unroll
    for (int i = 0; i < BLOCKS * SUMS; ++i) sums.of[i / SUMS][i % SUMS] = 0;
    u32 before = 0;  // the stage before this one, to be released once its products are done
    u32 slot = at % STAGES;
    barrier_wait(full + 8 * slot, at / STAGES & 1);
    u32 tokens = stages + slot * STAGE_BYTES;
    const u32 first_unit = TOKEN_BYTES + (K_GROUPS ? 0 : group * BLOCKS * UNIT);
    if constexpr (SHARED) fetch(held[0][0], tokens + first_unit, 0, thread);
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      const u8* const next = step + 1 < count ? here + TURNS * STEP_BYTES : upcoming;
      const u32 at_next = at + 2 * TURNS;
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        const u32 units = tokens + first_unit;
        const bool last_stage = stage && step + 1 == count;
        const u32 follower = stage ? at_next : at + 1;
        const u32 next_slot = follower % STAGES;
#pragma unroll
        for (int p = 0; p < PRODUCTS; ++p) {
          const int o = stage * PRODUCTS + p;
          start_product(sums, SHARED ? held[0][o % 4] : held[stage][p], tokens, units, p);
          if (p + 1 < PRODUCTS) {
            if (SHARED) fetch(held[0][(o + 1) % 4], units, p + 1, thread);
          } else if (!last_stage) {
            barrier_wait(full + 8 * next_slot, follower / STAGES & 1);
            const u32 next_units = stages + next_slot * STAGE_BYTES + first_unit;
            if (SHARED) fetch(held[0][(o + 1) % 4], next_units, 0, thread);
          }
          products_wait<1>();
          if (p == 0) {
            if (speaks && (stage || step)) barrier_arrive(empty + 8 * before);
            if (!SHARED) load_stage(held[1 - stage], stage ? next : here + 2 * UNIT, thread);
          }
        }
        before = slot;
        slot = next_slot;
        tokens = stages + slot * STAGE_BYTES;
      }
      at = at_next;
      here = next;
    }
    TokenScales scales;
    load_scales(scales, token_scales, item_of(opaque(index), shape).token_tile * TOKENS, shape.tokens);
    products_wait<0>();
    if (speaks) barrier_arrive(empty + 8 * before);
    position += 2 * of_item;

    // Worked out again, so that it occupies no registers in the loop above.
    const Item item = item_of(opaque(index), shape);
    bool mine = true;
    if constexpr (K_GROUPS) {
      gather_groups(sums, group, thread, stages + GATHER, fresh, more);
      mine = group == 0;
    }
    if (SS_SPLITS && mine) {
      mine = gather_splits(sums, item, K_GROUPS ? 0 : group, thread, shape, partials, arrived, last);
    }
#ifdef SS_NOEPI
    if (channels < 0)
#endif
    if (mine) write_tile(sums, scales, scale_buffer, item, group, thread, shape, to);
    if (!more) break;
    fresh = false;
    index += gridDim.x;
  }
}
