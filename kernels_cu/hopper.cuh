// What the Hopper GEMM asks of the hardware beyond primitives.cuh: barriers in shared memory, the copy
// engine, warpgroups.  PTX ISA 8.0 and newer, sm_90a.
#pragma once

#include "primitives.cuh"

// Dynamic shared memory at a multiple of 1024, as swizzled tiles need.
#define SS_ALIGNED_STAGE(name) extern __shared__ __align__(1024) u8 name[]

// A CUtensorMap: opaque, passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  u64 words[16];
};

// --- barriers in shared memory (mbarrier) ---------------------------------------------------------

SS_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
SS_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
SS_DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}
// Arrive, and let the phase also wait for `bytes` from the copy engine.
SS_DEVICE void barrier_arrive_for_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase with this parity is over.
SS_DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}
// Barrier `name` (1 to 15) among `threads` threads of the block; a warp comes to it as one.
SS_DEVICE void named_barrier(u32 name, u32 threads) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" : : "r"(name), "r"(threads) : "memory");
}

// --- clusters -------------------------------------------------------------------------------------

// Until all threads of the cluster's blocks that have not ended are here, and what each did before can be
// seen by all.  WARPS: of each warp all threads come at a time.
template <bool WARPS = true>
SS_DEVICE void cluster_sync() {
  if constexpr (WARPS) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
  } else {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" : : : "memory");
  }
}
// Where in the cluster's shared memory lies what block `rank` has at this address of its own.
SS_DEVICE u32 shared_of_block(u32 address, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
SS_DEVICE uint4 cluster_load16(u32 there) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

// --- the copy engine ------------------------------------------------------------------------------

// A box of a 2-dimensional tensor to shared memory; `barrier` counts the bytes.  What lies outside the
// tensor becomes zeros and is counted too.
SS_DEVICE void copy_box(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// Bytes that lie together, a multiple of 16.
SS_DEVICE void copy_bytes(u32 target, const u8* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(target), "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// A box from shared memory; what lies outside the tensor is left out.
SS_DEVICE void store_box(const TensorMap* map, int column, int row, u32 source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :
               : "l"(map), "r"(column), "r"(row), "r"(source)
               : "memory");
}
SS_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }
// Until at most PENDING committed groups of this thread still read shared memory.
template <int PENDING>
SS_DEVICE void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING) : "memory");
}
// What this thread wrote to shared memory, the copy engine may read after a barrier.
SS_DEVICE void visible_to_copies() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// --- warpgroups -----------------------------------------------------------------------------------

template <int REGISTERS>
SS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
template <int REGISTERS>
SS_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
// Before the first product, and after registers that products read or write were touched.
SS_DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
SS_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Until at most PENDING committed groups are under way.
template <int PENDING>
SS_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}
// A tile in shared memory whose rows are 128 bytes, swizzled over 128: eight rows are 1024 bytes.
// PTX ISA, "Matrix descriptor format"; the second tile half of a row is 64 bytes (4 units) further.
SS_DEVICE u64 rows_of_128(u32 address) {
  constexpr u64 LAYOUT = (1ull << 62) | (static_cast<u64>(1024 >> 4) << 32) | (1ull << 16);
  return LAYOUT | ((address & 0x3ffffu) >> 4);
}
// The same of rows of 64 bytes, swizzled over 64: eight rows are 512 bytes.
SS_DEVICE u64 rows_of_64(u32 address) {
  constexpr u64 LAYOUT = (2ull << 62) | (static_cast<u64>(512 >> 4) << 32) | (1ull << 16);
  return LAYOUT | ((address & 0x3ffffu) >> 4);
}

// --- launches -------------------------------------------------------------------------------------

// Until the kernel launched before on the stream is over and what it wrote can be seen.  Before that
// only memory may be touched that no launch changes.  PTX ISA, griddepcontrol.
SS_DEVICE void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" : : : "memory"); }

// --- device memory --------------------------------------------------------------------------------

// Results: written once and not read here, so the first to leave L2.
SS_DEVICE void store_result(u8* address, u32 a) {
  asm volatile("st.global.cs.u32 [%0], %1;" : : "l"(address), "r"(a) : "memory");
}
SS_DEVICE void store_result(u8* address, uint2 v) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" : : "l"(address), "r"(v.x), "r"(v.y) : "memory");
}
SS_DEVICE void store_result(u8* address, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Memory that other blocks of this launch write.
SS_DEVICE uint4 load_shared_by_blocks(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}
SS_DEVICE uint2 shared_load8(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
// What was there; one more is there then, or 0 after `most`.  Before it comes what this thread knows to
// be written, after it what others had written when they counted.
SS_DEVICE u32 atomic_next(u32* address, u32 most) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(address), "r"(most)
               : "memory");
  return before;
}
// A counter that other blocks count in; after it comes what they had written when they counted.
SS_DEVICE u32 load_counter(const u32* address) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
