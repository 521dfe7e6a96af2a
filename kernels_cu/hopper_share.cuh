// Tiles that blocks of hopper_gemm.cu share, each with a part of K': how their sums meet in device memory,
// and what that has in common with clusters (hopper_cluster.cuh).
#pragma once

#include "hopper_results.cuh"

// A tile is added up and written in slices of so many times eight tokens, as many as there are registers for.
constexpr int SLICE = K_GROUPS && GROUPS == 2 && TOKENS >= 32 ? 4 : 2, SLICES = TOKENS / (8 * SLICE);
static_assert(TOKENS % (8 * SLICE) == 0, "a tile must be whole slices");
// Pieces of 16 bytes of sums that a thread writes, the warpgroups that do, and so the pieces of a part.
constexpr int PIECES = BLOCKS * SUMS / 4;
constexpr int WORKERS = K_GROUPS ? 1 : GROUPS;
constexpr i64 OF_PART = static_cast<i64>(WORKERS) * PIECES * GROUP_THREADS;
// How often a block looks whether the others have come, about 10 us.  It must not wait for ever: they may
// get a multiprocessor only when this block leaves one.
constexpr int PATIENCE = 32;

constexpr u32 SHARERS = WORKERS * GROUP_THREADS;

// A piece of a part of a tile's sums, which begins in device memory or in a block's shared memory.
SS_DEVICE uint4 load_piece(const uint4* part, int piece) {
  return load_shared_by_blocks(part + piece * GROUP_THREADS);
}
SS_DEVICE uint4 load_piece(u32 part, int piece) { return cluster_load16(part + piece * (GROUP_THREADS * 16)); }

SS_DEVICE void add_piece(u32* four, const uint4& piece) {
  four[0] = plus(four[0], piece.x), four[1] = plus(four[1], piece.y);
  four[2] = plus(four[2], piece.z), four[3] = plus(four[3], piece.w);
}

// A part of one slice: what the sum begins with, or what is added to it.
template <bool FIRST, typename Part>
SS_DEVICE void add_part(Quads (&sums)[SLICE], Part part, int slice) {
#pragma unroll
  for (int i = 0; i < SLICE * BLOCKS; ++i) {
    u32* const four = sums[i % SLICE].of[i / SLICE];
    const uint4 piece = load_piece(part, i / SLICE * (PIECES / BLOCKS) + SLICE * slice + i % SLICE);
    if constexpr (FIRST) {
      four[0] = piece.x, four[1] = piece.y, four[2] = piece.z, four[3] = piece.w;
    } else {
      add_piece(four, piece);
    }
  }
}

// One slice, added up in the order of K'.  `part_at`: where this thread's pieces of a part begin.
template <bool VECTOR, typename PartAt>
SS_DEVICE void write_slice(const PartAt& part_at, int parts, int slice, const Channels& channels,
                           const Target& target, const Shape& shape, const Epilogue& to) {
  Quads sums[SLICE];
  add_part<true>(sums, part_at(0), slice);
#pragma unroll 4
  for (int part = 1; part < parts; ++part) add_part<false>(sums, part_at(part), slice);
  const i64 row_bytes = to.out_stride * OUT_BYTES;
#pragma unroll
  for (int j = 0; j < SLICE; ++j) {
    const int column = SLICE * slice + j, token = target.token + 8 * column;
    store_two<VECTOR>(sums[j], channels, target.scales + 32 * column,
                      to.out + token * row_bytes + static_cast<i64>(target.channel) * OUT_BYTES, row_bytes,
                      target.left, shape.tokens - token);
  }
}

// The slices of one of so many portions of a tile.
template <typename PartAt>
SS_DEVICE void write_portion(const PartAt& part_at, int parts, int portion, int portions,
                             const Channels& channels, const Target& target, const Shape& shape,
                             const Epilogue& to) {
  const int each = (SLICES + portions - 1) / portions, first = portion * each;
#pragma unroll 1
  for (int slice = first; slice < first + each && slice < SLICES; ++slice) {
    if (stores_vectors(target, to)) {
      write_slice<true>(part_at, parts, slice, channels, target, shape, to);
    } else if (target.left > 0) {
      write_slice<false>(part_at, parts, slice, channels, target, shape, to);
    }
  }
}

// Where this thread's pieces of a part begin in `partials`.
SS_DEVICE uint4* part_of(uint4* partials, const Sharing& sharing, int part, int group, int thread) {
  const int slot = part ? sharing.second_slot + (part - 1) * sharing.slot_step : sharing.first_slot;
  return partials + slot * OF_PART + group * PIECES * GROUP_THREADS + thread;
}

// What blocks share tiles through: room for parts, counters of tiles, and two words of shared memory in
// which one thread of a block tells something to the others.
struct Meeting {
  uint4* partials;
  u32* counters;
  volatile u32* broadcast;
  SS_DEVICE u32* counters_of(const Sharing& sharing) const { return counters + COUNTERS_A_TILE * sharing.counter; }
};
// Each word has its user: threads may still read the one while the other is written.
constexpr int OF_PORTIONS = 0, OF_SECOND = 1;

constexpr u32 NO_LIMIT = 0xffffffffu;

// Where two blocks share a tile and the second has left its part already, as a rule where ranges are longer
// than tiles: `sums` becomes the sum of both, and nothing need be written.  Returns whether it is so.
SS_DEVICE bool add_second(Sums& sums, const Place& place, int thread, const Meeting& meeting) {
  const Sharing sharing = kept_sharing(place);
  if (K_GROUPS || sharing.part != 0 || sharing.parts != 2) return false;
  u32* const counts = meeting.counters_of(sharing);
  const bool speaker = place.group == 0 && thread == 0;
  if (speaker) meeting.broadcast[OF_SECOND] = load_counter(counts);
  named_barrier(PART_KNOWN, SHARERS);
  const bool there = meeting.broadcast[OF_SECOND] == 1;
  if (there) {
    const uint4* const theirs = part_of(meeting.partials, sharing, 1, place.group, thread);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) add_piece(sums.of[4 * i / SUMS] + 4 * i % SUMS, load_piece(theirs, i));
  }
  named_barrier(PART_WRITTEN, SHARERS);
  if (there && speaker) {
    // No portion is left when the other, if it still waits, sees that all came.
    atomic_next(counts + 1, NO_LIMIT), atomic_next(counts + 1, NO_LIMIT);
    atomic_next(counts, NO_LIMIT);
    if (atomic_next(counts + 2, 1) == 1) counts[0] = counts[1] = 0;
  }
  __syncwarp();
  return there;
}

// Blocks that share a tile, the kept item: each leaves its part of the sums in `partials` and counts itself.
// All parts there, the tile is dealt out in as many portions as there are blocks: to those that waited, and
// to the last to come, who may find nobody else.  Who has more to do (`more`) does not wait.  Low tiles, of
// warpgroups that share K', are not worth that: they are one portion, for the last to come.
//
// Counters of a tile: how many came, how many portions are dealt out, how many left; all zero again
// afterwards.
SS_DEVICE void share_tile(const Sums& sums, bool more, const Place& place, int thread, const Shape& shape,
                          const Epilogue& to, const Meeting& meeting) {
  const bool speaker = place.group == 0 && thread == 0;
  {
    const Sharing sharing = kept_sharing(place);
    uint4* const own = part_of(meeting.partials, sharing, sharing.part, place.group, thread);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const u32* const four = sums.of[4 * i / SUMS] + 4 * i % SUMS;
      own[i * GROUP_THREADS] = make_uint4(four[0], four[1], four[2], four[3]);
    }
    named_barrier(PART_WRITTEN, SHARERS);
  }
  const Sharing sharing = kept_sharing(place);
  u32* const counts = meeting.counters_of(sharing);
  const u32 parts = sharing.parts, portions = K_GROUPS ? 1 : parts;
  u32 portion = portions;  // none
  if (speaker) {
    // After everything that the barrier made this thread see, and before what it lets others do.
    u32 come = atomic_next(counts, NO_LIMIT) + 1;
    if constexpr (K_GROUPS) {
      if (come == parts) portion = 0;
    } else {
      for (int look = more ? PATIENCE : 0; come < parts && look < PATIENCE; ++look) come = load_counter(counts);
      if (come == parts) portion = atomic_next(counts + 1, NO_LIMIT);
    }
  }
  const Target target = target_of(kept_item(place), place, shape);
  const Channels channels = channels_of(to, target.channel, target.left);
  const auto part_at = [&](int part) { return part_of(meeting.partials, sharing, part, place.group, thread); };
#pragma unroll 1
  while (true) {
    if (speaker) meeting.broadcast[OF_PORTIONS] = portion;
    named_barrier(PART_KNOWN, SHARERS);
    const u32 mine = meeting.broadcast[OF_PORTIONS];
    if (mine >= portions) break;
    if (speaker) portion = K_GROUPS ? portions : atomic_next(counts + 1, NO_LIMIT);
    write_portion(part_at, parts, mine, portions, channels, target, shape, to);
    named_barrier(PART_WRITTEN, SHARERS);
  }
  // Nobody of this block reads parts any more.  The last to leave clears the counters, at once, so that
  // launches that should not have met leave no trace.
  if (speaker && atomic_next(counts + 2, parts - 1) == parts - 1) counts[0] = counts[1] = 0;
  __syncwarp();
}
