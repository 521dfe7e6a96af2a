"""Two correct kernels that compute-sanitizer's racecheck is asked about, to know what it can see.

    compute-sanitizer --tool racecheck python benchmarks/racecheck_controls.py copies
    compute-sanitizer --tool racecheck python benchmarks/racecheck_controls.py barriers

They order their accesses to shared memory in the two ways in which hopper_gemm.cu does, each as the
PTX manual writes it down, and nothing else.  "copies": the copy engine fills a buffer, a barrier in
shared memory (mbarrier) counts its bytes, threads wait for that, read, and count themselves at a
second barrier, for which the next copy waits.  "barriers": half of the threads write and half read,
each telling the other with bar.arrive and waiting with bar.sync.  What racecheck reports of these
it also reports of any kernel made so.  Both check their results.  Needs compute capability 9.0.
"""

from __future__ import annotations

import sys

import cupy

_SOURCE = r"""
using u32 = unsigned;
__device__ u32 at(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
__device__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" : : "r"(barrier), "r"(parity) : "memory");
}

// Rounds of 32 words: warp 1 asks for them, warp 0 adds them up.
extern "C" __global__ void copies(const u32* from, u32* sums, int rounds) {
  __shared__ alignas(128) u32 words[32];
  __shared__ alignas(8) unsigned long long full, empty;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(at(&full)) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" : : "r"(at(&empty)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  }
  __syncthreads();
  u32 sum = 0;
  for (int r = 0; r < rounds; ++r) {
    if (threadIdx.x == 32) {
      wait(at(&empty), (r & 1) ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;"
                   : : "r"(at(&full)) : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];"
          : : "r"(at(words)), "l"(from + 32 * r), "r"(at(&full)) : "memory");
    }
    if (threadIdx.x < 32) {
      wait(at(&full), r & 1);
      sum += words[threadIdx.x];
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(at(&empty)) : "memory");
    }
  }
  if (threadIdx.x < 32) sums[threadIdx.x] = sum;
}

// Warp 1 writes, warp 0 reads and adds up.
extern "C" __global__ void barriers(const u32* from, u32* sums, int rounds) {
  __shared__ u32 words[32];
  const int lane = threadIdx.x & 31;
  u32 sum = 0;
  for (int r = 0; r < rounds; ++r) {
    if (threadIdx.x < 32) {
      asm volatile("bar.sync 1, 64;" : : : "memory");
      sum += words[lane];
      asm volatile("bar.arrive 2, 64;" : : : "memory");
    } else {
      if (r) asm volatile("bar.sync 2, 64;" : : : "memory");
      words[lane] = from[32 * r + lane];
      asm volatile("bar.arrive 1, 64;" : : : "memory");
    }
  }
  if (threadIdx.x >= 32) asm volatile("bar.sync 2, 64;" : : : "memory");
  if (threadIdx.x < 32) sums[lane] = sum;
}
"""


def main() -> None:
    (name,) = sys.argv[1:]
    if name not in ("copies", "barriers"):
        raise SystemExit(f"{name!r} is unknown; allowed are copies, barriers")
    module = cupy.RawModule(code=_SOURCE)
    rounds = 100
    words = cupy.random.randint(0, 1000, (rounds, 32), dtype=cupy.uint32)
    sums = cupy.zeros(32, cupy.uint32)
    module.get_function(name)((1,), (64,), (words, sums, rounds))
    assert bool((sums == words.sum(axis=0, dtype=cupy.uint32)).all()), "wrong sums"
    print(f"{name}: sums are right")


if __name__ == "__main__":
    main()
