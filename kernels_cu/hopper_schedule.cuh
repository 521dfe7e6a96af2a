// Which tiles, or which parts of their K', each block of hopper_gemm.cu works on.
#pragma once

#include "primitives.cuh"

// How many came, how many portions are dealt out, how many left (hopper_share.cuh).
constexpr int COUNTERS_A_TILE = 3;

struct Shape {
  int tokens, channels, steps, panels;
  int weight_tiles, token_tiles, group;
  int whole, splits;  // tiles that are not split, and into how many parts of K' the others are: with
                      // CLUSTERS all, one for each block of a cluster
  int ranges;         // or, if not 0: how many equal parts all channels' K' are cut into
};

// Of a tile that blocks share: which of how many parts one has, the tile's counters, and where parts lie:
// the first, the second, and how far it is from there to the next.
struct Sharing {
  int part, parts;
  int counter, first_slot, second_slot, slot_step;
};

// What a block works on at a time: a tile, or a part of its K'.
struct Item {
  int weight_tile, token_tile;
  int first, count;  // steps of 256 bytes of K'
  Sharing sharing;
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
  // A block shares at most the first and the last of its tiles: two slots each.
  const int counter = first_range * tiles + token_tile, between = 2 * tiles;
  item.sharing.part = range - first_range, item.sharing.parts = last_range - first_range + 1;
  item.sharing.counter = counter, item.sharing.first_slot = 2 * counter + 1;
  item.sharing.second_slot = 2 * counter + between, item.sharing.slot_step = between;
  return item;
}

// Tiles are numbered `group` weight tiles wide, all token tiles deep, so that what runs at a time shares
// both operands in L2; blocks read the same parts of K' at about the same time for the same reason.
SS_DEVICE void place_tile(Item& item, int tile, const Shape& shape) {
  const int of_group = shape.group * shape.token_tiles;
  const int which = tile / of_group, rest = tile - which * of_group;
  const int first = which * shape.group;
  const int width = shape.weight_tiles - first < shape.group ? shape.weight_tiles - first : shape.group;
  item.token_tile = rest / width;
  item.weight_tile = first + rest - item.token_tile * width;
}

// Which of a tile's equal parts of K' is whose.
SS_DEVICE void take_part(Item& item, int part, const Shape& shape) {
  const u32 steps = shape.steps;
  item.first = static_cast<int>(steps * part / shape.splits);
  item.count = static_cast<int>(steps * (part + 1) / shape.splits) - item.first;
}

// Whole tiles, then the parts of the others.
SS_DEVICE Item item_of_tile(int number, const Shape& shape) {
  const int index = blockIdx.x + number * gridDim.x;
  Item item;
  int tile = index;
  item.first = 0, item.count = shape.steps, item.sharing = Sharing{0, 1, 0, 0, 0, 1};
  if constexpr (SPLITS) {
    if (index >= shape.whole) {
      const int counter = (index - shape.whole) / shape.splits, slot = counter * shape.splits;
      const int part = index - shape.whole - slot;
      item.sharing = Sharing{part, shape.splits, counter, slot, slot + 1, 1};
      tile = shape.whole + counter;
      take_part(item, part, shape);
    }
  }
  place_tile(item, tile, shape);
  return item;
}

// Tiles of which each block of a cluster has a part.
SS_DEVICE Item item_of_cluster(int number, const Shape& shape) {
  const int cluster = blockIdx.x / shape.splits, part = blockIdx.x - cluster * shape.splits;
  Item item;
  item.sharing = Sharing{part, shape.splits, 0, 0, 0, 0};
  take_part(item, part, shape);
  place_tile(item, cluster + number * (gridDim.x / shape.splits), shape);
  return item;
}

// What this block does as number `number`.
SS_DEVICE Item item_of(int number, const Shape& shape) {
  if constexpr (CLUSTERS) return item_of_cluster(number, shape);
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
  if constexpr (CLUSTERS) {
    const int clusters = gridDim.x / shape.splits;
    return (tiles - static_cast<int>(blockIdx.x / shape.splits) + clusters - 1) / clusters;
  }
  const int items = SPLITS ? shape.whole + (tiles - shape.whole) * shape.splits : tiles;
  return (items - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
}
