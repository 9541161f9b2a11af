// Laws of float32 logits, and the first of a row's largest numbers, for the rounds of a CPU.
//
// XLA computes exponentials twice, for their sum and for the law, and takes four passes over the vocabulary for the first of
// equal maxima. A row's numbers do not depend on the other rows, on their number, or on the threads.

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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FirstLargest, first_largest,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Ret<Flags>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Laws, laws, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Vector>().Arg<Vector>().Arg<Flags>().Ret<Matrix>());
