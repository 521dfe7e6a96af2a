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
// `partials`, where those blocks that are there when the last has come add them up (hopper_share.cuh).
// SS_CLUSTERS: the blocks of a cluster share each tile, and add up their sums out of each other's shared
// memory (hopper_cluster.cuh).  All of them add in the order of K': repeated runs give the same bits.
//
// Its parts in headers: hopper_schedule.cuh, which tiles a block works on; hopper_results.cuh, from sums to
// results; hopper_share.cuh and hopper_cluster.cuh, tiles that blocks share.
//
// Compile-time settings (slidesparse_rt/kernels/catalog.py):
//   SS_TYPE     int8, E4M3, bfloat16 or float16 (numbers.cuh); SS_OUT float32, float16, bfloat16
//   SS_TOKENS   tokens of a tile; SS_BLOCKS blocks of 64 channels of a warpgroup, 1 or 2
//   SS_GROUPS   warpgroups that multiply; SS_STAGES stages; SS_KGROUPS, SS_SPLITS, SS_CLUSTERS as above
#include "hopper.cuh"
#include "wgmma_sparse.cuh"

constexpr int TOKENS = SS_TOKENS, BLOCKS = SS_BLOCKS, GROUPS = SS_GROUPS, STAGES = SS_STAGES;
constexpr bool K_GROUPS = SS_KGROUPS, SPLITS = SS_SPLITS, CLUSTERS = SS_CLUSTERS, EACH_LANE = SS_EACHLANE;
// Whether blocks may share tiles, in one way or another.
constexpr bool SHARED = SPLITS || CLUSTERS;
static_assert(!CLUSTERS || !(SPLITS || K_GROUPS), "a cluster is one way to share K', without others");
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

// Shared memory: stages, result buffers, scales of tokens and the item for each warp, sums of warpgroups,
// barriers, two words that all threads are told.  kernels/hopper_tiles.py adds up the same.
constexpr int RESULTS = STAGES * STAGE_BYTES;
constexpr int SCALES = RESULTS + (BOXES ? GROUPS * 4 * 2 * BOX_BYTES : 0);
constexpr int ITEMS = SCALES + GROUPS * 4 * TOKENS * 4;
constexpr int ITEM_BYTES = 32;
constexpr int GATHER = ITEMS + GROUPS * 4 * ITEM_BYTES;
constexpr int BARRIERS = GATHER + (K_GROUPS ? (GROUPS - 1) * BLOCKS * SUMS * GROUP_THREADS * 4 : 0);

// A barrier tells only even from odd uses of a stage: who waits for one must have seen the use before.
// Where warpgroups take turns, each stage must therefore always be the same warpgroup's.
static_assert(!K_GROUPS || STAGES % (2 * GROUPS) == 0, "stages must be whole rounds of turns");

// Names of barriers among warpgroups.
constexpr u32 GATHER_FULL = 1, PART_WRITTEN = 2, PART_KNOWN = 3, STAGES_READ = 4;

// Whether there are registers to spare for scale and bias of channels while the last products run.
constexpr bool EARLY = !SHARED && BLOCKS * TOKENS <= 384;

// A warpgroup that multiplies may need more registers than an even share, one that loads needs few.
constexpr bool UNEVEN = GROUPS == 2 && BLOCKS * TOKENS >= 128;

struct Sums {
  u32 of[BLOCKS][SUMS];
};

// The headers of this kernel use what is above them.
#include "hopper_schedule.cuh"

// Which warp this is, and where in shared memory it has its tokens' scales, its results and its item.
struct Place {
  int group, warp;
  u32 shared;
  SS_DEVICE u32 scales() const { return shared + SCALES + (4 * group + warp) * (TOKENS * 4); }
  SS_DEVICE u32 buffers() const { return shared + RESULTS + (4 * group + warp) * (2 * BOX_BYTES); }
  SS_DEVICE u32 item() const { return shared + ITEMS + (4 * group + warp) * ITEM_BYTES; }
};

// What is in shared memory occupies no registers beside the sums.
SS_DEVICE void keep_item(const Place& place, const Item& item) {
  const Sharing& sharing = item.sharing;
  __syncwarp();  // nobody reads the one before any more
  if ((threadIdx.x & 31) == 0) {
    shared_store16(place.item(), item.weight_tile, item.token_tile, sharing.parts, sharing.part);
    if constexpr (SPLITS) {
      shared_store16(place.item() + 16, sharing.counter, sharing.first_slot, sharing.second_slot,
                     sharing.slot_step);
    }
  }
  __syncwarp();
}
// But for which steps.
SS_DEVICE Item kept_item(const Place& place) {
  Item item;
  item.weight_tile = shared_load4(place.item()), item.token_tile = shared_load4(place.item() + 4);
  return item;
}
SS_DEVICE bool is_shared(const Place& place) { return SPLITS && shared_load4(place.item() + 8) > 1; }
SS_DEVICE Sharing kept_sharing(const Place& place) {
  Sharing sharing;
  sharing.parts = shared_load4(place.item() + 8), sharing.part = shared_load4(place.item() + 12);
  if constexpr (SPLITS) {
    sharing.counter = shared_load4(place.item() + 16), sharing.first_slot = shared_load4(place.item() + 20);
    sharing.second_slot = shared_load4(place.item() + 24), sharing.slot_step = shared_load4(place.item() + 28);
  }
  return sharing;
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
    // Who loads meets the others of the cluster, too, when they gather the tile (hopper_cluster.cuh).
    if constexpr (CLUSTERS) cluster_sync<false>(), cluster_sync<false>();
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

#include "hopper_results.cuh"
#include "hopper_share.cuh"
#include "hopper_cluster.cuh"

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
  u32* const broadcast = reinterpret_cast<u32*>(shared + BARRIERS + 16 * STAGES + 8);
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
  if constexpr (CLUSTERS) {
    cluster_sync();  // as long as all threads are there
  } else {
    __syncthreads();
  }

  // The same for all threads of a warp, and known to be: products need it.
  const int of_all = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = of_all / 4, warp = of_all % 4;
  if (group == GROUPS) {
    if constexpr (UNEVEN) give_registers<24>();
    // The others end here, so that a cluster does not wait for them.
    if (threadIdx.x != GROUPS * GROUP_THREADS) return;
    load_stages(&token_map, packed, shape, early, stages, full, empty);
    return;
  }
  if constexpr (UNEVEN) take_registers<240>();
  wait_for_launch_before();
  const int thread = threadIdx.x % GROUP_THREADS;
  const Epilogue to{token_scales, channel_scales, bias, out, out_stride, &out_map, storing};
  const u32 turn = K_GROUPS ? group : 0;
  const u32 own_units = TOKEN_BYTES + (K_GROUPS ? 0 : group * BLOCKS * UNIT);
  const Place place{group, warp, stages};
  const Meeting meeting{partials, counters, broadcast};
  u32 position = 0;  // stages of all former items
  Sums sums;
  // Fetched one product ahead; products in flight read theirs.
  u32 metadata[4];
  static_assert(IN_FLIGHT + 2 <= 4, "a product's metadata must not be overwritten");

  // Where tiles are high and not shared, there is no register for it.
  const int items = SHARED ? items_of(shape) : 0;
  int number = 0;
#pragma unroll 1
  while (true) {
    const bool more = SHARED ? number + 1 < items
                             : static_cast<int>(blockIdx.x + (number + 1) * gridDim.x) < weight_tiles * token_tiles;
    const Item now = item_of(number, shape);
    const int of_item = now.count;
    keep_item(place, now);
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
    // What comes from far away, while the last products run.
    fetch_scales(place.scales(), token_scales, kept_item(place).token_tile * TOKENS, tokens);
    Channels held;
    if constexpr (EARLY) {
      const Target target = target_of(kept_item(place), place, shape);
      held = channels_of(to, target.channel, target.left);
    }
    products_wait<0>();
    release_stage(empty + 8 * before);
    position += 2 * of_item;

    if constexpr (K_GROUPS) gather_groups(sums, group, thread, stages + GATHER, gather_free, number);
    if constexpr (CLUSTERS) {
      gather_cluster(sums, place, thread, shape, to);
    } else if (!K_GROUPS || group == 0) {
      if (!is_shared(place) || add_second(sums, place, thread, meeting)) {
        const Target target = target_of(kept_item(place), place, shape);
        if constexpr (!EARLY) held = channels_of(to, target.channel, target.left);
        write_tile(sums, held, target, shape, to);
      } else {
        share_tile(sums, more, place, thread, shape, to, meeting);
      }
    }
    if (!more) break;
    ++number;
  }
  // Shared memory must outlive the stores that read it.
  if (BOXES && (thread & 31) == 0) stores_wait_read<0>();
}
