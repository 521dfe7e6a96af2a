// Tiles that the blocks of a cluster share, each with a part of K': how their sums meet in shared memory.
#pragma once

#include "hopper_share.cuh"

// Barriers of a block at which all of its cluster arrive, once for each tile: when they have left their
// sums, and when they have read all that they add up.
struct ClusterBarriers {
  u32 come, left;
};

// A warp's first lanes arrive at a barrier of each block.
SS_DEVICE void arrive_everywhere(u32 barrier, u32 blocks) {
  if (threadIdx.x < blocks) cluster_arrive(shared_of_block(barrier, threadIdx.x));
}

// Each block leaves its sums where its stages were (and boxes, which there are none of), and adds up and writes an equal portion of the tile out
// of the shared memory of all, in the order of K'.  `round` counts tiles.  When a block's `left` is over,
// nobody reads its sums any more: not before may it load further stages, or end.
SS_DEVICE void gather_cluster(const Sums& sums, u32 stages, u32 round, const ClusterBarriers& barriers,
                              const Place& place, int thread, const Shape& shape, const Epilogue& to) {
  static_assert(!CLUSTERS || WORKERS * PIECES * GROUP_THREADS * 16 <= SCALES, "sums must fit before the rest");
  const u32 own = stages + (place.group * PIECES * GROUP_THREADS + thread) * 16;
  // Until no product of another warpgroup reads a stage.
  named_barrier(STAGES_READ, SHARERS);
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u32* const four = sums.of[4 * i / SUMS] + 4 * i % SUMS;
    shared_store16(own + i * (GROUP_THREADS * 16), four[0], four[1], four[2], four[3]);
  }
  visible_to_copies();  // which write there next
  named_barrier(PART_WRITTEN, SHARERS);
  const Sharing sharing = kept_sharing(place);
  arrive_everywhere(barriers.come, sharing.parts);
  const Target target = target_of(kept_item(place), place, shape);
  const Channels channels = channels_of(to, target.channel, target.left);
  const auto part_at = [&](int part) { return shared_of_block(own, part); };
  cluster_wait(barriers.come, round & 1);
  write_portion(part_at, sharing.parts, sharing.part, sharing.parts, channels, target, shape, to);
  named_barrier(PART_KNOWN, SHARERS);
  arrive_everywhere(barriers.left, sharing.parts);
  __syncwarp();  // the warp goes on as one: products need it
}
