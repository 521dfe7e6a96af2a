// multiply() of kernels_cu/wgmma_sparse.cuh for a CPU: the same registers from the same bytes.
//
// PTX ISA, "Asynchronous warpgroup-level matrix multiply-accumulate: wgmma.mma_async.sp".
#pragma once

#include "hopper.cuh"
#include "numbers.cuh"

constexpr int OPERAND_BYTES = bytes_of(SS_TYPE);
// Windows of four elements in the 64 bytes of K' that a product covers.
constexpr int PRODUCT_WINDOWS = 16 / OPERAND_BYTES;

inline float operand_value(const u8* at) {
  if (SS_TYPE == SS_E4M3) {
    const int exponent = *at >> 3 & 15, mantissa = *at & 7;
    const float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                                     : std::ldexp(static_cast<float>(mantissa), -9);
    return *at & 0x80 ? -magnitude : magnitude;
  }
  u16 bits;
  std::memcpy(&bits, at, 2);
  return SS_TYPE == SS_BF16 ? as_float(static_cast<u32>(bits) << 16) : from_f16(bits);
}

// `bytes` of row `row` of a tile, from its descriptor.
inline void read_row(u64 descriptor, int row, int bytes, u8* out) {
  const u32 start = static_cast<u32>(descriptor & 0x3fff) << 4;
  const int layout = static_cast<int>(descriptor >> 62);
  const u32 eight_rows = static_cast<u32>(descriptor >> 32 & 0x3fff) << 4;
  const int width = layout == 1 ? 128 : 64;
  if (layout < 1 || layout > 2 || eight_rows != 8u * width) complain("an unknown tile layout");
  for (int b = 0; b < bytes; ++b) {
    const u32 plain = start + row / 8 * eight_rows + row % 8 * width + b;
    const u32 at = layout == 1 ? swizzled_128(plain) : swizzled_64(plain);
    if (at >= machine.shared_bytes) {
      complain("a product reads beyond shared memory");
      return;
    }
    out[b] = machine.shared_base[at];
  }
}

inline void multiply_now(const Product& product) {
  const int thread = machine.running % 128, lane = thread % 32, warp = thread / 32, q = lane % 4, g = lane / 4;
  int places[2][2 * PRODUCT_WINDOWS];
  u8 kept[2][32];
  for (int h = 0; h < 2; ++h) {
    read_row(product.weights, 16 * warp + g + 8 * h, 32, kept[h]);
    for (int w = 0; w < PRODUCT_WINDOWS; ++w) {
      const int by = OPERAND_BYTES == 1 ? 4 * g + 2 * (w / 8) + h : 4 * g + 2 * product.selector + w / 4;
      const int shift = OPERAND_BYTES == 1 ? 4 * (w % 8) : 16 * h + 4 * (w % 4);
      const u32 nibble = product.metadata[32 * warp + by] >> shift & 15;
      if ((nibble & 3) >= nibble >> 2) complain("indices of a window that do not ascend");
      places[h][2 * w] = 4 * w + (nibble & 3), places[h][2 * w + 1] = 4 * w + (nibble >> 2);
    }
  }
  for (int j = 0; j < SS_TOKENS / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      u8 token[64];
      read_row(product.tokens, 8 * j + 2 * q + e, 64, token);
      for (int h = 0; h < 2; ++h) {
        u32& d = product.d[4 * j + 2 * h + e];
        float sum = as_float(d);
        for (int i = 0; i < 2 * PRODUCT_WINDOWS; ++i) {
          const u8* const a = kept[h] + i * OPERAND_BYTES;
          const u8* const b = token + places[h][i] * OPERAND_BYTES;
          if (SS_TYPE == SS_S8) {
            d += static_cast<u32>(static_cast<signed char>(*a) * static_cast<signed char>(*b));
          } else {
            sum += operand_value(a) * operand_value(b);
          }
        }
        if (SS_TYPE != SS_S8) d = as_bits(sum);
      }
    }
  }
}

inline void multiply(u32 (&d)[SS_TOKENS / 2], u64 weights, u64 tokens, u32 metadata, int selector) {
  const int first = machine.running / 128 * 128;
  Barrier& group = engine.warpgroups.emplace(first, Barrier{128, 0, 0}).first->second;
  machine.lanes[machine.running] = metadata;
  wait_at(group);
  std::vector<u32> all(machine.lanes.begin() + first, machine.lanes.begin() + first + 128);
  wait_at(group);
  my_products().back().push_back({d, weights, tokens, selector, std::move(all)});
}
