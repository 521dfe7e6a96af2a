// wgmma.mma_async.sp: 64 weight rows (sparse) times SS_TOKENS tokens, both in shared memory.
//
// PTX ISA, "Asynchronous warpgroup-level matrix multiply-accumulate: wgmma.mma_async.sp" and "Matrix
// fragments for warpgroup-level multiply-accumulate operation with sparse matrix A".
//
// One instruction covers 64 bytes of K': 64 elements of int8 and E4M3 (k64), 32 of bfloat16 and
// float16 (k32).  The accumulator of a thread are TOKENS / 2 registers: with lane = thread % 32, q =
// lane % 4, g = lane / 4, register 4j + 2h + e is row 16 * warp + g + 8h, token 8j + 2q + e.
//
// Inline assembly names operands by number, so the list of accumulators is spelled by the
// preprocessor: SS_TEN(3) is "%30, ..., %39", SS_HOLD_TEN(3) the matching constraints.
#pragma once

#include "numbers.cuh"

#define SS_TWO(t) "%" #t "0,%" #t "1"
#define SS_FOUR(t) SS_TWO(t) ",%" #t "2,%" #t "3"
#define SS_SIX(t) SS_FOUR(t) ",%" #t "4,%" #t "5"
#define SS_EIGHT(t) SS_SIX(t) ",%" #t "6,%" #t "7"
#define SS_TEN(t) SS_EIGHT(t) ",%" #t "8,%" #t "9"
#define SS_HOLD_TWO(t) "+r"(d[t##0]), "+r"(d[t##1])
#define SS_HOLD_FOUR(t) SS_HOLD_TWO(t), "+r"(d[t##2]), "+r"(d[t##3])
#define SS_HOLD_SIX(t) SS_HOLD_FOUR(t), "+r"(d[t##4]), "+r"(d[t##5])
#define SS_HOLD_EIGHT(t) SS_HOLD_SIX(t), "+r"(d[t##6]), "+r"(d[t##7])
#define SS_HOLD_TEN(t) SS_HOLD_EIGHT(t), "+r"(d[t##8]), "+r"(d[t##9])

// SS_D and SS_HOLD: the accumulators.  SS_I0, SS_I1, SS_I2: the operands behind them.
#if SS_TOKENS == 16
#define SS_SHAPE "m64n16"
#define SS_D SS_EIGHT()
#define SS_HOLD SS_HOLD_EIGHT()
#define SS_I0 "%8"
#define SS_I1 "%9"
#define SS_I2 "%10"
#elif SS_TOKENS == 32
#define SS_SHAPE "m64n32"
#define SS_D SS_TEN() "," SS_SIX(1)
#define SS_HOLD SS_HOLD_TEN(), SS_HOLD_SIX(1)
#define SS_I0 "%16"
#define SS_I1 "%17"
#define SS_I2 "%18"
#elif SS_TOKENS == 64
#define SS_SHAPE "m64n64"
#define SS_D SS_TEN() "," SS_TEN(1) "," SS_TEN(2) "," SS_TWO(3)
#define SS_HOLD SS_HOLD_TEN(), SS_HOLD_TEN(1), SS_HOLD_TEN(2), SS_HOLD_TWO(3)
#define SS_I0 "%32"
#define SS_I1 "%33"
#define SS_I2 "%34"
#elif SS_TOKENS == 128
#define SS_SHAPE "m64n128"
#define SS_D                                                                               \
  SS_TEN() "," SS_TEN(1) "," SS_TEN(2) "," SS_TEN(3) "," SS_TEN(4) "," SS_TEN(5) "," SS_FOUR(6)
#define SS_HOLD                                                                           \
  SS_HOLD_TEN(), SS_HOLD_TEN(1), SS_HOLD_TEN(2), SS_HOLD_TEN(3), SS_HOLD_TEN(4),          \
      SS_HOLD_TEN(5), SS_HOLD_FOUR(6)
#define SS_I0 "%64"
#define SS_I1 "%65"
#define SS_I2 "%66"
#elif SS_TOKENS == 160
#define SS_SHAPE "m64n160"
#define SS_D                                                                                \
  SS_TEN() "," SS_TEN(1) "," SS_TEN(2) "," SS_TEN(3) "," SS_TEN(4) "," SS_TEN(5) "," SS_TEN(6) \
  "," SS_TEN(7)
#define SS_HOLD                                                                           \
  SS_HOLD_TEN(), SS_HOLD_TEN(1), SS_HOLD_TEN(2), SS_HOLD_TEN(3), SS_HOLD_TEN(4),          \
      SS_HOLD_TEN(5), SS_HOLD_TEN(6), SS_HOLD_TEN(7)
#define SS_I0 "%80"
#define SS_I1 "%81"
#define SS_I2 "%82"
#elif SS_TOKENS == 192
#define SS_SHAPE "m64n192"
#define SS_D                                                                                \
  SS_TEN() "," SS_TEN(1) "," SS_TEN(2) "," SS_TEN(3) "," SS_TEN(4) "," SS_TEN(5) "," SS_TEN(6) \
  "," SS_TEN(7) "," SS_TEN(8) "," SS_SIX(9)
#define SS_HOLD                                                                           \
  SS_HOLD_TEN(), SS_HOLD_TEN(1), SS_HOLD_TEN(2), SS_HOLD_TEN(3), SS_HOLD_TEN(4),          \
      SS_HOLD_TEN(5), SS_HOLD_TEN(6), SS_HOLD_TEN(7), SS_HOLD_TEN(8), SS_HOLD_SIX(9)
#define SS_I0 "%96"
#define SS_I1 "%97"
#define SS_I2 "%98"
#elif SS_TOKENS == 208
#define SS_SHAPE "m64n208"
#define SS_D                                                                                \
  SS_TEN() "," SS_TEN(1) "," SS_TEN(2) "," SS_TEN(3) "," SS_TEN(4) "," SS_TEN(5) "," SS_TEN(6) \
  "," SS_TEN(7) "," SS_TEN(8) "," SS_TEN(9) "," SS_FOUR(10)
#define SS_HOLD                                                                           \
  SS_HOLD_TEN(), SS_HOLD_TEN(1), SS_HOLD_TEN(2), SS_HOLD_TEN(3), SS_HOLD_TEN(4),          \
      SS_HOLD_TEN(5), SS_HOLD_TEN(6), SS_HOLD_TEN(7), SS_HOLD_TEN(8), SS_HOLD_TEN(9),     \
      SS_HOLD_FOUR(10)
#define SS_I0 "%104"
#define SS_I1 "%105"
#define SS_I2 "%106"
#else
#error "SS_TOKENS: no such instruction is spelled here"
#endif

// The instruction's name from its types on, and what follows the metadata: selector (a digit), the
// predicate p, signs of A and B, and for 16-bit types that neither is transposed.
#if SS_TYPE == SS_S8
#define SS_TYPES "k64.s32.s8.s8"
#define SS_TAIL ", p;\n"
#elif SS_TYPE == SS_E4M3
#define SS_TYPES "k64.f32.e4m3.e4m3"
#define SS_TAIL ", p, 1, 1;\n"
#elif SS_TYPE == SS_BF16
#define SS_TYPES "k32.f32.bf16.bf16"
#define SS_TAIL ", p, 1, 1, 0, 0;\n"
#elif SS_TYPE == SS_F16
#define SS_TYPES "k32.f32.f16.f16"
#define SS_TAIL ", p, 1, 1, 0, 0;\n"
#endif

#define SS_WGMMA(SELECTOR)                                                                         \
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                          \
               "wgmma.mma_async.sp.sync.aligned." SS_SHAPE SS_TYPES " {" SS_D "}, " SS_I0 ", " SS_I1 \
               ", " SS_I2 ", " SELECTOR SS_TAIL "}\n"                                              \
               : SS_HOLD                                                                           \
               : "l"(weights), "l"(tokens), "r"(metadata))

// d += weights * tokens, both by their descriptors.  `selector`, a constant: which two threads of a quad
// bring the metadata of a 16-bit instruction; 8-bit ones take all four.
SS_DEVICE void multiply(u32 (&d)[SS_TOKENS / 2], u64 weights, u64 tokens, u32 metadata, int selector) {
  if (selector) {
    SS_WGMMA("1");
  } else {
    SS_WGMMA("0");
  }
}
