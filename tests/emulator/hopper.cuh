// The functions of kernels_cu/hopper.cuh for a CPU: barriers in shared memory, the copy engine,
// warpgroups.
//
// What hardware does at a time of its own is done at the worst time that it may: a load destroys its
// target at once and delivers when somebody waits for it; a store reads its source, and a product its
// operands, only when the thread waits for them.
#pragma once

#include <map>

#include "primitives.cuh"

#define __grid_constant__
#define SS_ALIGNED_STAGE(name) u8* const name = machine.shared_base

// Host memory that tests/emulate.py fills: address, columns, rows, bytes from row to row, columns and
// rows of a box, bytes of an element.
struct TensorMap {
  const i64* words;
  u8* address() const { return reinterpret_cast<u8*>(words[0]); }
  i64 row_bytes() const { return words[1] * words[6]; }
  i64 rows() const { return words[2]; }
  i64 stride() const { return words[3]; }
  int box_bytes() const { return static_cast<int>(words[4] * words[6]); }
  int box_rows() const { return static_cast<int>(words[5]); }
  int size() const { return static_cast<int>(words[6]); }
};

struct Load {
  u32 target;
  std::vector<u8> bytes;
};
struct Mbarrier {
  int expected = 0, missing = 0, bytes = 0;
  u32 phase = 0;
  std::vector<Load> loads;
};
struct Store {
  const TensorMap* map;
  int column, row;
  u32 source;
};
struct Product {
  u32* d;
  u64 weights, tokens;
  int selector;
  std::vector<u32> metadata;  // of the warpgroup's threads
};
struct Engine {
  std::map<u32, Mbarrier> barriers;
  std::map<u32, Barrier> named;
  std::map<int, Barrier> warpgroups;  // by first thread
  std::map<int, std::vector<std::vector<Store>>> stores;      // by thread; the last group is open
  std::map<int, std::vector<std::vector<Product>>> products;  // the same
  std::map<int, bool> waited;  // threads for which the launch before is over
};
inline Engine engine;

inline void wait_for_launch_before() { engine.waited[machine.running] = true; }
// What the launch before may still write or read.
inline void touch_changing_memory() {
  if (!engine.waited[machine.running]) complain("the launch before may not be over");
}

inline void reset_engine() {
  for (const auto& of_thread : engine.stores)
    for (const auto& group : of_thread.second)
      if (!group.empty()) complain("a block ended before its stores had read shared memory");
  for (const auto& of_thread : engine.products)
    for (const auto& group : of_thread.second)
      if (!group.empty()) complain("a block ended before its products were done");
  engine = Engine{};
}
inline std::map<unsigned, Engine> engines;  // of blocks that are put aside
inline void change_engine(unsigned block) { std::swap(engine, engines[block]); }
inline const int registered =
    (machine.at_edges.push_back(reset_engine), machine.at_switch.push_back(change_engine), 0);

// --- barriers -------------------------------------------------------------------------------------

inline void settle(Mbarrier& barrier) {
  if (barrier.bytes < 0) complain("more bytes arrived than a barrier expects");
  if (barrier.missing || barrier.bytes) return;
  barrier.missing = barrier.expected, ++barrier.phase, ++machine.progress;
}
inline void barrier_init(u32 barrier, u32 arrivals) {
  shared_at(barrier, 8);
  Mbarrier fresh;
  fresh.expected = fresh.missing = static_cast<int>(arrivals);
  engine.barriers[barrier] = fresh;
}
inline void barrier_init_done() {}
inline void arrive(Mbarrier& barrier) {
  if (--barrier.missing < 0) complain("too many arrivals at a barrier");
  settle(barrier);
}
inline void barrier_arrive(u32 barrier) {
  arrive(engine.barriers.at(barrier));
  give_way();  // whoever waited may go on before this thread does anything else
}
inline void barrier_arrive_for_bytes(u32 barrier, u32 bytes) {
  engine.barriers.at(barrier).bytes += static_cast<int>(bytes);
  arrive(engine.barriers.at(barrier));
}
inline void barrier_wait(u32 barrier, u32 parity) {
  Mbarrier& held = engine.barriers.at(barrier);
  // A wait that is over at once sees nothing of loads that are still under way, as on hardware.
  while ((held.phase & 1) == parity) {
    std::vector<Load> loads;
    loads.swap(held.loads);
    for (const Load& load : loads) {
      std::memcpy(machine.shared_base + load.target, load.bytes.data(), load.bytes.size());
      held.bytes -= static_cast<int>(load.bytes.size());
    }
    if (!loads.empty()) settle(held);
    if ((held.phase & 1) == parity) give_way();
  }
}
inline void named_barrier_arrive(u32 name, u32 threads) {
  if (name < 1 || name > 15) complain("no such named barrier");
  Barrier& barrier = engine.named[name];
  if (barrier.arrived && barrier.expected != static_cast<int>(threads)) {
    complain("threads disagree about a named barrier");
  }
  barrier.expected = static_cast<int>(threads);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0, ++barrier.phase, ++machine.progress;
  }
}
inline void named_barrier(u32 name, u32 threads) {
  const int phase = engine.named[name].phase;
  named_barrier_arrive(name, threads);
  while (engine.named[name].phase == phase) give_way();
  for (int i = 0; machine.running / 128 % 2 == 1 && i < machine.linger; ++i) give_way();
}

// --- clusters -------------------------------------------------------------------------------------

// Threads that have ended are not waited for.
template <bool WARPS = true>
void cluster_sync() {
  if (WARPS) __syncwarp();
  Barrier& meeting = machine.meetings[machine.block.x / machine.cluster];
  ++meeting.arrived;
  for (const int phase = meeting.phase; meeting.phase == phase;) {
    if (meeting.arrived == threads_of_cluster()) {
      meeting.arrived = 0, ++meeting.phase, ++machine.progress;
    } else {
      give_way();
    }
  }
}
// An address, and one more than the block's number in its cluster above it.
constexpr u32 OF_RANK = 1u << 24;
inline u32 shared_of_block(u32 address, u32 rank) {
  if (rank >= static_cast<u32>(machine.cluster)) complain("no such block in the cluster");
  return address + (rank + 1) * OF_RANK;
}
inline unsigned block_of_cluster(u32 there) {
  const unsigned block = machine.block.x / machine.cluster * machine.cluster + there / OF_RANK - 1;
  if (!is_running(block)) complain("shared memory of a block that has ended");
  return block;
}
inline uint4 cluster_load16(u32 there) {
  uint4 v;
  std::memcpy(&v, shared_at(there % OF_RANK, 16, shared_base_of(block_of_cluster(there))), 16);
  return v;
}

// --- the copy engine ------------------------------------------------------------------------------

inline void load(u32 target, std::vector<u8> bytes, u32 barrier) {
  if (target + bytes.size() > machine.shared_bytes) {
    complain("a load beyond shared memory");
    return;
  }
  std::memset(machine.shared_base + target, 0xa5, bytes.size());
  engine.barriers.at(barrier).loads.push_back({target, std::move(bytes)});
}
// The 128-byte swizzle: of an address, bits 4 to 6 are crossed with bits 7 to 9.
inline u32 swizzled_128(u32 address) { return address ^ ((address >> 7 & 7) << 4); }
inline u32 swizzled_64(u32 address) { return address ^ ((address >> 7 & 3) << 4); }

inline void copy_box(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
  if (target % 1024) complain("a swizzled box that is not aligned");
  touch_changing_memory();
  std::vector<u8> bytes(map->box_rows() * 128, 0);
  for (int r = 0; r < map->box_rows(); ++r) {
    for (int b = 0; b < 128; ++b) {
      const i64 at = static_cast<i64>(column) * map->size() + b;
      if (row + r < map->rows() && at < map->row_bytes()) {
        bytes[swizzled_128(r * 128 + b)] = map->address()[(row + r) * map->stride() + at];
      }
    }
  }
  load(target, std::move(bytes), barrier);
}
inline void copy_bytes(u32 target, const u8* from, u32 bytes, u32 barrier) {
  if (target % 16 || bytes % 16 || reinterpret_cast<std::uintptr_t>(from) % 16) {
    complain("misaligned bulk copy");
  }
  load(target, std::vector<u8>(from, from + bytes), barrier);
}
inline std::vector<std::vector<Store>>& my_stores() {
  auto& groups = engine.stores[machine.running];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void store_box(const TensorMap* map, int column, int row, u32 source) {
  if (source % (8 * map->box_bytes())) complain("a swizzled box that is not aligned");
  touch_changing_memory();
  my_stores().back().push_back({map, column, row, source});
}
inline void stores_commit() { my_stores().emplace_back(); }
inline void store_now(const Store& store) {
  const TensorMap& map = *store.map;
  for (int r = 0; r < map.box_rows(); ++r) {
    for (int b = 0; b < map.box_bytes(); ++b) {
      const i64 at = static_cast<i64>(store.column) * map.size() + b;
      const u32 from = store.source + r * map.box_bytes() + b;
      // Pieces of 16 bytes that begin within the row are written whole.
      if (store.row + r < map.rows() && at / 16 * 16 < map.row_bytes()) {
        map.address()[(store.row + r) * map.stride() + at] =
            machine.shared_base[map.box_bytes() == 64 ? swizzled_64(from) : swizzled_128(from)];
      }
    }
  }
}
template <int PENDING>
void stores_wait_read() {
  auto& groups = my_stores();
  while (static_cast<int>(groups.size()) - 1 > PENDING) {
    for (const Store& store : groups.front()) store_now(store);
    groups.erase(groups.begin());
  }
}
inline void visible_to_copies() {}  // copies see everything here: that it is missing does not show

// --- warpgroups -----------------------------------------------------------------------------------

template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}
inline void products_fence() {}
inline std::vector<std::vector<Product>>& my_products() {
  auto& groups = engine.products[machine.running];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void products_commit() { my_products().emplace_back(); }
void multiply_now(const Product& product);  // wgmma_sparse.cuh
template <int PENDING>
void products_wait() {
  auto& groups = my_products();
  while (static_cast<int>(groups.size()) - 1 > PENDING) {
    for (const Product& product : groups.front()) multiply_now(product);
    groups.erase(groups.begin());
  }
  __syncwarp();  // a warp waits as one
}
inline u64 rows_of_128(u32 address) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | address >> 4; }
inline u64 rows_of_64(u32 address) { return 2ull << 62 | 32ull << 32 | 1ull << 16 | address >> 4; }
inline u32 __shfl_sync(u32, u32 value, int lane) {
  const int first = machine.running / 32 * 32;
  machine.lanes[machine.running] = value;
  __syncwarp();
  const u32 found = machine.lanes[first + lane];
  __syncwarp();
  return found;
}

// --- device memory --------------------------------------------------------------------------------

template <typename T>
void checked_store(u8* address, T value) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof value) complain("misaligned global store");
  touch_changing_memory();
  std::memcpy(address, &value, sizeof value);
}
inline void store_result(u8* address, u32 a) { checked_store(address, a); }
inline void store_result(u8* address, uint2 v) { checked_store(address, v); }
inline void store_result(u8* address, uint4 v) { checked_store(address, v); }
inline uint4 load_shared_by_blocks(const uint4* address) {
  touch_changing_memory();
  return *address;
}
inline uint2 shared_load8(u32 address) {
  uint2 v;
  std::memcpy(&v, shared_at(address, 8), 8);
  return v;
}
inline u32 atomic_next(u32* address, u32 most) {
  touch_changing_memory();
  const u32 before = *address;
  *address = before >= most ? 0 : before + 1;
  return before;
}
// Who looks for others lets them go on.
inline u32 load_counter(const u32* address) {
  touch_changing_memory();
  for (int i = 0; i < machine.others_turns; ++i) give_way();
  return *address;
}
