// Laws of float32 logits, the clocks of races between tokens, and the first of a row's largest numbers, for the rounds of a
// CPU.
//
// XLA computes exponentials twice, for their sum and for the law, takes four passes over the vocabulary for the first of
// equal maxima, and has one thread for random numbers. A row's numbers do not depend on the other rows, on their number,
// or on the threads.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "lanes.h"
#include "share.h"

namespace ffi = xla::ffi;

namespace {

using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Flags = ffi::Buffer<ffi::S32, 1>;
using Words = ffi::Buffer<ffi::U32, 1>;

struct Largest {
  float value;
  int64_t first;
};

// The largest of so many numbers and where it stands first; NaN and the last place where one is NaN.
Largest largest(const float* row, int64_t size) {
  const float none = -std::numeric_limits<float>::infinity();
  Lanes most = Lanes{} + none;
  Bits unknown{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Lanes here = load(row + i);
    most = here > most ? here : most, unknown |= here != here;
  }
  float top = reduced(most, [](float a, float b) { return std::max(a, b); });
  int32_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= unknown[lane];
  for (; i < size; ++i) top = std::max(top, row[i]), any |= row[i] != row[i];
  if (any) return {std::numeric_limits<float>::quiet_NaN(), size - 1};
  return {top, std::find(row, row + size, top) - row};
}

ffi::Error first_largest(ffi::ThreadPool pool, Matrix x, ffi::Result<Flags> places) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  const float* all = x.typed_data();
  int32_t* made = places->typed_data();
  share(pool, rows * size, rows, [=](int64_t r) { made[r] = static_cast<int32_t>(largest(all + r * size, size).first); });
  return ffi::Error::Success();
}

// exp of a row less its largest number, over the temperature, where that is no less than `floor`; then over their sum.
void law(const float* row, int64_t size, float temperature, float floor, float* made) {
  const float top = largest(row, size).value;
  Lanes sum{};
  const auto weight = [=](Lanes x) {
    x -= top;
    // Exact in either case, and a division takes as long as half of the exponential.
    if (temperature != 1.0f) x /= temperature;
    return x >= floor ? exponential(x) : Lanes{};
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Lanes here = weight(load(row + i));
    store(made + i, here), sum += here;
  }
  if (i < size) {
    float rest[kLanes];
    std::fill_n(rest, kLanes, -std::numeric_limits<float>::infinity());
    std::copy_n(row + i, size - i, rest);
    const Lanes here = weight(load(rest));
    store(rest, here), sum += here;
    std::copy_n(rest, size - i, made + i);
  }

  // Of a row with a number that is not finite the largest is NaN or the sum 0: so it has no law, as in XLA's form.
  const float whole = top != top ? top : total(sum);
  for (i = 0; i + kLanes <= size; i += kLanes) store(made + i, load(made + i) / whole);
  for (; i < size; ++i) made[i] /= whole;
}

ffi::Error laws(ffi::ThreadPool pool, Matrix logits, Vector temperatures, Vector floors, Flags sampled,
                ffi::Result<Matrix> y) {
  const int64_t rows = logits.dimensions()[0], size = logits.dimensions()[1];
  // An exponential is some sixteen products.
  share(pool, 16 * rows * size, rows, [&](int64_t r) {
    const float* row = logits.typed_data() + r * size;
    float* made = y->typed_data() + r * size;
    if (sampled.typed_data()[r]) {
      law(row, size, temperatures.typed_data()[r], floors.typed_data()[r], made);
    } else {
      std::fill_n(made, size, 0.0f);
      made[largest(row, size).first] = 1.0f;
    }
  });
  return ffi::Error::Success();
}

// log of normal numbers above 0, within two units of the last place.
Lanes logarithm(Lanes x) {
  const Bits bits = (Bits)x;
  Lanes rest = (Lanes)((bits & 0x007fffff) | 0x3f000000);  // in [1/2, 1)
  const Bits low = rest < 0.70710678f;                     // -1 where it is doubled
  const Lanes power = __builtin_convertvector((bits >> 23) - 126 + low, Lanes);
  rest = (low ? rest + rest : rest) - 1.0f;
  Lanes sum = rest * 7.0376836292e-2f - 1.1514610310e-1f;
  sum = sum * rest + 1.1676998740e-1f;
  sum = sum * rest - 1.2420140846e-1f;
  sum = sum * rest + 1.4249322787e-1f;
  sum = sum * rest - 1.6668057665e-1f;
  sum = sum * rest + 2.0000714765e-1f;
  sum = sum * rest - 2.4999993993e-1f;
  sum = sum * rest + 3.3333331174e-1f;
  const Lanes square = rest * rest;
  sum = sum * rest * square - power * 2.12194440e-4f - square * 0.5f;
  return rest + sum + power * 0.693359375f;
}

// Uniform numbers in [0, 1) of a Threefry-2x32 key from counter `at` on: those of decoding/noise.py, bit by bit.
Lanes uniform(uint32_t key_high, uint32_t key_low, uint32_t at) {
  const uint32_t words[3] = {key_high, key_low, key_high ^ key_low ^ 0x1BD11BDA};
  constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const Wholes index = (Wholes)places();
  Wholes high = Wholes{} + words[0], low = index + (at + words[1]);
  for (int group = 0; group < 5; ++group) {
    for (const int by : rotations[group % 2]) {
      high += low;
      low = high ^ (low << by | low >> (32 - by));
    }
    high += words[(group + 1) % 3], low += words[(group + 2) % 3] + (group + 1);
  }
  return (Lanes)(((high ^ low) >> 9) | 0x3F800000u) - 1.0f;
}

// Numbers that a thread makes in one go.
constexpr int64_t kPiece = 4096;

// -log u [N, V] of the uniform numbers of N keys.
ffi::Error waits(ffi::ThreadPool pool, Words high, Words low, ffi::Result<Matrix> y) {
  const int64_t rows = high.dimensions()[0], size = y->dimensions()[1], pieces = (size + kPiece - 1) / kPiece;
  // A number takes some eight products.
  share(pool, 8 * rows * size, rows * pieces, [&](int64_t part) {
    const int64_t row = part / pieces, end = std::min(size, (part % pieces + 1) * kPiece);
    float* made = y->typed_data() + row * size;
    for (int64_t i = part % pieces * kPiece; i < end; i += kLanes) {
      const Lanes u = uniform(high.typed_data()[row], low.typed_data()[row], static_cast<uint32_t>(i));
      const float tiny = std::numeric_limits<float>::min();
      const Lanes wait = -logarithm(u > tiny ? u : Lanes{} + tiny);
      if (i + kLanes <= end) {
        store(made + i, wait);
      } else {
        float rest[kLanes];
        store(rest, wait);
        std::copy_n(rest, end - i, made + i);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Waits, waits,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Words>().Arg<Words>().Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FirstLargest, first_largest,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Ret<Flags>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Laws, laws, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Vector>().Arg<Vector>().Arg<Flags>().Ret<Matrix>());
