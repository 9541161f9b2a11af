// Sixteen numbers at a time.

#pragma once

#include <cstdint>

// Compilers split them for CPUs with shorter vectors.
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16;

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

// bfloat16 numbers, the upper halves of float32 ones.
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t Bits __attribute__((vector_size(64)));
inline Lanes load(const uint16_t* from) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
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
