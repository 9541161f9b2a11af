// As many numbers at a time as a register of the CPU holds.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

// Compilers split longer ones, but keep them in memory between operations: with AVX2, products in lanes of sixteen took
// six times as long as XLA's (docs/log.md).
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

// bfloat16 numbers, the upper halves of float32 ones.
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef uint32_t Wholes __attribute__((vector_size(4 * kLanes)));
inline Lanes load(const uint16_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // One instruction, where GCC's code for the line below widens halves and joins them.
  return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
#endif
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Wholes) << 16);
}

// 0, 1, 2, ...
inline Bits places() {
  Bits made{};
  for (int64_t i = 0; i < kLanes; ++i) made[i] = static_cast<int32_t>(i);
  return made;
}

inline void store(float* to, Lanes lanes) { *reinterpret_cast<Lanes*>(to) = lanes; }

// All numbers of one, combined two by two.
template <typename Combine>
inline float reduced(Lanes lanes, Combine combine) {
  float parts[kLanes];
  store(parts, lanes);
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] = combine(parts[i], parts[i + half]);
  return parts[0];
}

inline float total(Lanes lanes) {
  return reduced(lanes, [](float a, float b) { return a + b; });
}

// exp of numbers no larger than 0, within two units of the last place; 0 below -87.
inline Lanes exponential(Lanes x) {
  const Bits tiny = x < -87.0f;
  x = tiny ? x - x : x;
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
  const float round = 12582912.0f;
  const Lanes shifted = x * 1.44269504f + round, whole = shifted - round;
  const Lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Lanes sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Bits power = (((Bits)shifted - 0x4b400000) + 127) << 23;
  return tiny ? Lanes{} : sum * (Lanes)power;
}
