// Tiles that the blocks of a cluster share, each with a part of K': how their sums meet in shared memory.
#pragma once

#include "hopper_share.cuh"

// Each block leaves its sums where its stages were (and boxes, which there are none of), and adds up and
// writes an equal portion of the tile out of the shared memory of all, in the order of K'.  All threads of the
// cluster meet twice for it, also those that load stages: when the sums are there, and when they are read.
// Not before may a block load further stages, or end.
SS_DEVICE void gather_cluster(const Sums& sums, const Place& place, int thread, const Shape& shape,
                              const Epilogue& to) {
  static_assert(!CLUSTERS || WORKERS * PIECES * GROUP_THREADS * 16 <= SCALES, "sums must fit before the rest");
  const u32 own = place.shared + (place.group * PIECES * GROUP_THREADS + thread) * 16;
  // Until no product of another warpgroup reads a stage.
  named_barrier(STAGES_READ, SHARERS);
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u32* const four = sums.of[4 * i / SUMS] + 4 * i % SUMS;
    shared_store16(own + i * (GROUP_THREADS * 16), four[0], four[1], four[2], four[3]);
  }
  visible_to_copies();  // which write there next
  const Sharing sharing = kept_sharing(place);
  const Target target = target_of(kept_item(place), place, shape);
  const Channels channels = channels_of(to, target.channel, target.left);
  const auto part_at = [&](int part) { return shared_of_block(own, part); };
  cluster_sync();
  write_portion(part_at, sharing.parts, sharing.part, sharing.parts, channels, target, shape, to);
  cluster_sync();
}
