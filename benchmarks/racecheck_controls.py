"""Correct kernels that compute-sanitizer's racecheck is asked about, to know what it can see.

    compute-sanitizer --tool racecheck python benchmarks/racecheck_controls.py lanes
    compute-sanitizer --tool racecheck python benchmarks/racecheck_controls.py warps

Both order their accesses to shared memory as hopper_gemm.cu does, and do nothing else: the copy
engine fills a buffer, a barrier in shared memory (mbarrier) counts its bytes, threads wait for
that, read, and are counted at a second barrier, for which the next copy waits.  Of "lanes" each
reader arrives by itself, as the PTX manual has it; of "warps" one lane arrives for its warp, after
__syncwarp().  What racecheck reports of these it also reports of any kernel made so.  Both check
their results.  Needs compute capability 9.0.
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
template <bool EACH>
__device__ void rounds_of_copies(const u32* from, u32* sums, int rounds) {
  __shared__ alignas(128) u32 words[32];
  __shared__ alignas(8) unsigned long long full, empty;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(at(&full)) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 : : "r"(at(&empty)), "r"(EACH ? 32 : 1) : "memory");
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
      if (!EACH) __syncwarp();
      if (EACH || threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(at(&empty)) : "memory");
      }
    }
  }
  if (threadIdx.x < 32) sums[threadIdx.x] = sum;
}
extern "C" __global__ void lanes(const u32* from, u32* sums, int rounds) {
  rounds_of_copies<true>(from, sums, rounds);
}
extern "C" __global__ void warps(const u32* from, u32* sums, int rounds) {
  rounds_of_copies<false>(from, sums, rounds);
}
"""


def main() -> None:
    (name,) = sys.argv[1:]
    if name not in ("lanes", "warps"):
        raise SystemExit(f"{name!r} is unknown; allowed are lanes, warps")
    module = cupy.RawModule(code=_SOURCE)
    rounds = 100
    words = cupy.random.randint(0, 1000, (rounds, 32), dtype=cupy.uint32)
    sums = cupy.zeros(32, cupy.uint32)
    module.get_function(name)((1,), (64,), (words, sums, rounds))
    assert bool((sums == words.sum(axis=0, dtype=cupy.uint32)).all()), "wrong sums"
    print(f"{name}: sums are right")


if __name__ == "__main__":
    main()
