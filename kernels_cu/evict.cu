// Reads memory and wants nothing of it: what else the level-2 cache holds has to give way
// (slidesparse_rt/backends/cold.py).
#include "primitives.cuh"

SS_KERNEL(256, 1) evict(u8* memory, i64 pieces) {
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  u32 all = 0;
  for (i64 piece = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; piece < pieces; piece += step) {
    const uint4 found = load16_once(memory + 16 * piece);
    all |= found.x ^ found.y ^ found.z ^ found.w;
  }
  // Or else nothing would be read.  What is written then is of no use to anybody either.
  if (all == 0x5eed5eedu) memory[0] = 0;
}
