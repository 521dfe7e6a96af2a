// The functions of kernels_cu/primitives.cuh for a CPU, and what else the kernels use of CUDA.
//
// A CUDA thread is a fiber; the fibers of a block take turns at barriers, and blocks, or clusters, run one
// after another.  Shared memory is poisoned before every block; accesses to it are checked for bounds and
// alignment, and 16-byte and 8-byte loads of global memory for alignment.  tests/emulate.py drives it.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = unsigned long long;
using i64 = long long;

struct Index3 {
  unsigned x, y, z;
};
struct uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// --- the machine ---------------------------------------------------------------------------------

struct Barrier {
  int expected = 0, arrived = 0, phase = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = true;
};
struct Machine {
  Index3 thread{}, block{}, block_size{}, grid{};
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<u32> lanes;
  Barrier all;
  ucontext_t scheduler;
  int running = 0;
  std::vector<u8> shared;
  u8* shared_base = nullptr;
  u32 shared_bytes = 0;
  void (*entry)() = nullptr;
  const u64* arguments = nullptr;
  int progress = 0;  // grows whenever a barrier lets threads pass
  std::vector<void (*)()> at_edges;  // called before each block and after the last
  std::vector<void (*)(unsigned)> at_switch;  // a block is put aside or taken up again
  int others_turns = 0, linger = 0;
  int cluster = 1;                       // blocks of a cluster
  std::map<unsigned, Barrier> meetings;  // of all threads of a cluster
  char trouble[160] = "";
};
inline Machine machine;

#define threadIdx machine.thread
#define blockIdx machine.block
#define blockDim machine.block_size
#define gridDim machine.grid
#define __shared__ static
#define SS_DEVICE inline
#define SS_KERNEL(threads, blocks) extern "C" void
#define SS_STAGE(name) uint4* const name = reinterpret_cast<uint4*>(machine.shared_base)

inline void complain(const char* what) {
  if (!machine.trouble[0]) std::snprintf(machine.trouble, sizeof machine.trouble, "%s", what);
}

inline void give_way() {
  const int me = machine.running;
  swapcontext(&machine.fibers[me].context, &machine.scheduler);
}

inline void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0, ++barrier.phase, ++machine.progress;
    return;
  }
  for (const int phase = barrier.phase; barrier.phase == phase;) give_way();
}

inline void let_next_launch_begin() {}
inline void __syncthreads() { wait_at(machine.all); }
inline void __syncwarp() { wait_at(machine.warps[machine.running / 32]); }

template <typename Combine>
u32 over_warp(u32 mine, Combine combine) {
  const int first = machine.running / 32 * 32;
  machine.lanes[machine.running] = mine;
  __syncwarp();
  u32 result = machine.lanes[first];
  for (int lane = 1; lane < 32; ++lane) result = combine(result, machine.lanes[first + lane]);
  __syncwarp();
  return result;
}
inline u32 warp_max(u32 v) { return over_warp(v, [](u32 a, u32 b) { return a > b ? a : b; }); }
inline u32 warp_sum(u32 v) { return over_warp(v, [](u32 a, u32 b) { return a + b; }); }

inline void call_entry() {
  const u64* const a = machine.arguments;
  // Integers and pointers only: each takes one 8-byte slot, whatever its width.
  using F = void (*)(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64,
                     u64, u64, u64, u64, u64, u64, u64);
  reinterpret_cast<F>(machine.entry)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
                                     a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20],
                                     a[21], a[22], a[23]);
}

inline void fiber_main() {
  call_entry();
  machine.fibers[machine.running].done = true;
}

// What belongs to a block, while others run.
struct Block {
  unsigned number = 0;
  Index3 block{};
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<u32> lanes;
  Barrier all;
  std::vector<u8> shared;
  u8* shared_base = nullptr;
  int left = 0;
  // Neither moves what fibers and pointers refer to.
  void change_places() {
    std::swap(block, machine.block), std::swap(fibers, machine.fibers), std::swap(warps, machine.warps);
    std::swap(lanes, machine.lanes), std::swap(all, machine.all), std::swap(shared, machine.shared);
    std::swap(shared_base, machine.shared_base);
    for (const auto hook : machine.at_switch) hook(number);
  }
};

inline std::vector<Block> running;
inline bool is_running(unsigned number) {
  for (const Block& block : running) {
    if (block.number == number) return block.left > 0;
  }
  return false;
}
inline u8* shared_base_of(unsigned number) {
  for (const Block& block : running) {
    if (block.number == number && number != machine.block.x) return block.shared_base;
  }
  return machine.shared_base;
}

// How many threads of this block's cluster have not ended.
inline int threads_of_cluster() {
  int found = 0;
  for (const Block& block : running) {
    if (block.number / machine.cluster != machine.block.x / machine.cluster) continue;
    for (const Fiber& fiber : block.number == machine.block.x ? machine.fibers : block.fibers) found += !fiber.done;
  }
  return found;
}

inline void begin_block(unsigned b) {
  const int threads = static_cast<int>(machine.block_size.x * machine.block_size.y);
  machine.block = {b, 0, 0};
  for (const auto hook : machine.at_edges) hook();
  machine.shared.assign(machine.shared_bytes + 32, 0xa5);
  machine.shared_base = machine.shared.data() +
                        (16 - reinterpret_cast<std::uintptr_t>(machine.shared.data()) % 16) % 16;
  machine.lanes.assign(threads, 0);
  machine.all = {threads, 0, 0};
  machine.warps.assign((threads + 31) / 32, Barrier{32, 0, 0});
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    fiber.stack.resize(32768), fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// One turn of each thread of the block; returns how many are not done.
inline int turn_of_block(int order, int asleep) {
  const int x = static_cast<int>(machine.block_size.x), threads = x * static_cast<int>(machine.block_size.y);
  int left = 0;
  for (int i = 0; i < threads; ++i) {
    const int t = order == 1 ? threads - 1 - i : i;
    if (machine.fibers[t].done) continue;
    if (order > 1 && threads > 128 && t / 128 == asleep) {
      ++left;
      continue;
    }
    machine.running = t, machine.thread = {static_cast<unsigned>(t % x), static_cast<unsigned>(t / x), 0};
    swapcontext(&machine.scheduler, &machine.fibers[t].context);
    if (machine.fibers[t].done) ++machine.progress; else ++left;
  }
  return left;
}

// Runs `entry` (24 arguments) over a grid of `blocks`.  `order`: 0, threads take turns; 1, the last one
// first, and the last block; larger, each warpgroup of 128 in turn sleeps while the others go on, as this
// seed says, and one block of several that are a cluster.  `together`: blocks run at a time rather than one
// after the other, and who looks whether others have come lets them take so many turns.  `linger`: turns that
// every other warpgroup is late behind barriers among warpgroups.  `cluster`: blocks of a cluster, which
// always run at a time.  Returns "" or what went wrong.
extern "C" __attribute__((used, visibility("default"))) const char*
emulate(void (*entry)(), const u64* arguments, unsigned blocks, unsigned x, unsigned y, u32 shared_bytes,
        int order, int together, int linger, int cluster) {
  machine.trouble[0] = 0;
  machine.entry = entry, machine.arguments = arguments;
  machine.block_size = {x, y, 1}, machine.grid = {blocks, 1, 1};
  machine.shared_bytes = shared_bytes;
  machine.others_turns = together, machine.linger = linger;
  machine.cluster = cluster, machine.meetings.clear();
  const bool several = together || cluster > 1;
  const int most_idle = several ? 100000 : 1000 + linger;
  const unsigned at_a_time = together ? blocks : cluster;
  u32 random = order, rounds = 0, asleep = 0, late = 0;
  const u32 groups = (x * y + 127) / 128, others = groups > 1 ? groups - 1 : 1;
  running.clear();
  const auto all_done = [&] {
    for (const Block& block : running) {
      if (block.left) return false;
    }
    return true;
  };
  for (unsigned b = 0; b < blocks && !machine.trouble[0]; ++b) {
    Block block;
    block.left = 1;
    block.number = order == 1 ? blocks - 1 - b : b;
    begin_block(block.number);
    if (several) block.change_places();
    running.push_back(std::move(block));
    if ((b + 1) % at_a_time) continue;
    for (int idle = 0; !all_done() && idle < most_idle;) {
      const int before = machine.progress;
      // Long enough for the others to come to the next but one thing that they share.
      if (order > 1 && rounds++ % 200 == 0) {
        // Another one than before: the same again and again would look as if nobody could go on.
        random = random * 1664525u + 1013904223u;
        asleep = (asleep + 1 + (random >> 16) % others) % groups;
        late = (random >> 8) % running.size();
      }
      for (u32 i = 0; i < running.size(); ++i) {
        Block& one = running[i];
        if (!one.left || (cluster > 1 && order > 1 && i == late)) continue;
        if (several) one.change_places();
        const int left = turn_of_block(order, static_cast<int>(asleep));
        if (several) one.change_places();
        one.left = left;
      }
      idle = machine.progress != before ? 0 : idle + 1;
      if (idle == most_idle) complain("threads wait for each other for ever");
    }
    if (several) {
      for (Block& one : running) {
        one.change_places();
        for (const auto hook : machine.at_edges) hook();
        one.change_places();
      }
    }
    running.clear();
  }
  for (const auto hook : machine.at_edges) hook();
  return machine.trouble;
}

// --- the functions -------------------------------------------------------------------------------

template <typename T>
T checked_load(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T)) complain("misaligned global load");
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
inline uint4 load16_once(const void* address) { return checked_load<uint4>(address); }
inline uint2 load8_once(const void* address) { return checked_load<uint2>(address); }

inline u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const u8*>(pointer) - machine.shared_base);
}
inline u8* shared_at(u32 address, u32 bytes, u8* base = machine.shared_base) {
  static u8 nowhere[16];
  if (address % bytes) complain("misaligned access to shared memory");
  if (address + bytes > machine.shared_bytes) {
    complain("access beyond shared memory");
    return nowhere;
  }
  return base + address;
}
inline u32 shared_load4(u32 address) {
  u32 v;
  std::memcpy(&v, shared_at(address, 4), 4);
  return v;
}
inline uint4 shared_load16(u32 address) {
  uint4 v;
  std::memcpy(&v, shared_at(address, 16), 16);
  return v;
}
inline void shared_store4(u32 address, u32 a) { std::memcpy(shared_at(address, 4), &a, 4); }
inline void shared_store8(u32 address, u32 a, u32 b) {
  const u32 v[2] = {a, b};
  std::memcpy(shared_at(address, 8), v, 8);
}
inline void shared_store16(u32 address, u32 a, u32 b, u32 c, u32 d) {
  const u32 v[4] = {a, b, c, d};
  std::memcpy(shared_at(address, 16), v, 16);
}

inline float as_float(u32 bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline u32 as_bits(float value) {
  u32 v;
  std::memcpy(&v, &value, 4);
  return v;
}
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float from_int(int v) { return static_cast<float>(v); }

inline int opaque(int v) { return v; }

inline u32 pick(u32 low, u32 high, u32 selector) {
  const u64 bytes = static_cast<u64>(high) << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<u32>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return result;
}

// The sign of the result is that of the product, as on GPUs that have one instruction for this.
inline u32 max_magnitude16(u32 a, u32 b, u32 infinity) {
  const u32 x = a & 0x7fffu, y = b & 0x7fffu;
  if (x > infinity || y > infinity) return 0x7fffu;
  return (x > y ? x : y) | ((a ^ b) & 0x8000u);
}
inline u32 max_magnitude_f16x2(u32 a, u32 b) {
  return max_magnitude16(a & 0xffffu, b & 0xffffu, 0x7c00u) | max_magnitude16(a >> 16, b >> 16, 0x7c00u) << 16;
}
inline u32 max_magnitude_bf16x2(u32 a, u32 b) {
  return max_magnitude16(a & 0xffffu, b & 0xffffu, 0x7f80u) | max_magnitude16(a >> 16, b >> 16, 0x7f80u) << 16;
}
inline u32 max_magnitude_f32(u32 a, u32 b) {
  const u32 x = a & 0x7fffffffu, y = b & 0x7fffffffu;
  return x > y ? x : y;
}

inline float from_f16(u32 bits) {
  const u16 low = static_cast<u16>(bits);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return static_cast<float>(half);
}
inline u32 bits_f16(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline u32 bits_bf16(float value) {
  const u32 bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline u32 to_f16x2(float low, float high) { return bits_f16(low) | bits_f16(high) << 16; }
inline u32 to_bf16x2(float low, float high) { return bits_bf16(low) | bits_bf16(high) << 16; }

inline void atomic_add(u64* address, u64 v) { *address += v; }
inline void atomic_largest(u64* address, u64 v) { *address = *address > v ? *address : v; }

#define SS_HAS_E4M3 0
