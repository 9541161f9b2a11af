// What lies between the products of a decode round's few float32 rows: norms, gates, and the rotation's cosines.
//
// XLA runs each of these as several loops, and computes cosines again for every layer and head. A row's numbers do not
// depend on the other rows, on their number, or on the threads.

#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "share.h"

namespace ffi = xla::ffi;

namespace {

using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Positions = ffi::Buffer<ffi::S32, 1>;
using Result = ffi::Result<Matrix>;

// x / rms(x) * weight of each row of x [N, D].
ffi::Error normed(Matrix x, Vector weight, Result y, float eps) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x.typed_data() + r * size;
    // Two sums, so that an addition need not wait for the one before.
    Lanes even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
      even += load(row + i) * load(row + i), odd += load(row + i + kLanes) * load(row + i + kLanes);
    }
    if (i < size) even += load(row + i) * load(row + i);
    const float scale = 1.0f / std::sqrt(total(even + odd) / size + eps);
    for (i = 0; i < size; i += kLanes) {
      store(y->typed_data() + r * size + i, load(row + i) * scale * load(weight.typed_data() + i));
    }
  }
  return ffi::Error::Success();
}

// silu(gate) * up of rows [N, U (gate [F], up [F])], U units side by side.
ffi::Error gated(ffi::ThreadPool pool, Matrix x, Result y, int64_t width) {
  const int64_t rows = x.dimensions()[0], units = y->dimensions()[1] / width;
  const float* all = x.typed_data();
  float* made = y->typed_data();
  // An exponential is some sixteen products.
  share(pool, 16 * rows * units * width, rows * units, [=](int64_t unit) {
    const float* gate = all + 2 * unit * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Lanes g = load(gate + i), part = exponential(g < 0 ? g : -g);
      const Lanes sigmoid = (g < 0 ? part : Lanes{} + 1.0f) / (1.0f + part);
      store(made + unit * width + i, g * sigmoid * load(gate + width + i));
    }
  });
  return ffi::Error::Success();
}

// Cosines and sines [N, H] of positions [N] times frequencies [H].
ffi::Error rotations(Positions positions, Vector frequencies, Result cosines, Result sines) {
  const int64_t rows = positions.dimensions()[0], size = frequencies.dimensions()[0];
  for (int64_t i = 0; i < rows * size; ++i) {
    const float angle = static_cast<float>(positions.typed_data()[i / size]) * frequencies.typed_data()[i % size];
    cosines->typed_data()[i] = std::cos(angle), sines->typed_data()[i] = std::sin(angle);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NormedRows, normed,
                              ffi::Ffi::Bind().Arg<Matrix>().Arg<Vector>().Ret<Matrix>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatedRows, gated,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Ret<Matrix>().Attr<int64_t>("width"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(Rotations, rotations,
                              ffi::Ffi::Bind().Arg<Positions>().Arg<Vector>().Ret<Matrix>().Ret<Matrix>());
