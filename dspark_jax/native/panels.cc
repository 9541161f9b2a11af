// Products of float32 rows by a weight that is kept in panels, for the rounds and the prefills of a CPU: x [N, K] by
// panels [T, K, 48], of which panel t holds the columns 48 t .. 48 t + 47 of the weight, the last one filled up by zeros.
// The weight is float32, or bfloat16 and then widened as it is read: half the bytes, and the products are the same.
//
// A panel is read from its first number to its last, whatever the weight's width, with all sums in registers. A row's
// sums are added in an order of their own, so that they do not depend on the other rows, on their number, or on threads.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "lanes.h"
#include "share.h"

namespace ffi = xla::ffi;

namespace {

using Matrix = ffi::Buffer<ffi::F32, 2>;

constexpr int64_t kPanel = 48;

// Registers for the sums of so many rows by so many columns, in lanes, and for a row of the panel.
#if defined(__AVX512F__)
constexpr int64_t kRows = 9;
constexpr int64_t wide(int64_t) { return 3; }
#else
constexpr int64_t kRows = 6;
constexpr int64_t wide(int64_t rows) { return rows <= 2 ? 6 : rows == 3 ? 3 : 2; }
#endif
// Rows of a panel that are taken by all its columns before the next ones, where the registers hold a part of the columns:
// the first cache has them for the second part, and memory sends for the next all the while.
constexpr int64_t kDeep = 128;
// Bytes of the panel between the row that is multiplied and the one that is sent for.
constexpr int64_t kAhead = 9216;

template <typename Weight>
struct Product {
  const float* x;
  const Weight* panels;
  float* y;
  int64_t rows, inputs, outputs;
};

// R rows of the result from row `first` on, in the columns of a panel.
template <typename Weight, int R>
void by_panel(const Product<Weight>& p, int64_t first, int64_t panel) {
  constexpr int64_t ahead = kAhead / (kPanel * sizeof(Weight)) * kPanel;
  constexpr int64_t kWide = wide(R), kParts = kPanel / kLanes;
  const float* x = p.x + first * p.inputs;
  const Weight* weight = p.panels + panel * p.inputs * kPanel;
  Lanes whole[R][kParts] = {};

  for (int64_t from = 0; from < p.inputs;) {
    const int64_t to = kWide == kParts ? p.inputs : std::min(from + kDeep, p.inputs);
    for (int64_t at = 0; at < kParts; at += kWide) {
      Lanes sums[R][kWide];
      for (int r = 0; r < R; ++r) std::copy_n(whole[r] + at, kWide, sums[r]);
      for (int64_t k = from; k < to; ++k) {
        const Weight* row = weight + k * kPanel + at * kLanes;
        Lanes part[kWide];
        for (int c = 0; c < kWide; ++c) {
          // Past the last rows this asks for memory behind the panels, which a prefetch may.
          __builtin_prefetch(row + c * kLanes + ahead);
          part[c] = load(row + c * kLanes);
        }
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < kWide; ++c) sums[r][c] += x[r * p.inputs + k] * part[c];
      }
      for (int r = 0; r < R; ++r) std::copy_n(sums[r], kWide, whole[r] + at);
    }
    from = to;
  }

  for (int r = 0; r < R; ++r) {
    float* y = p.y + (first + r) * p.outputs + panel * kPanel;
    for (int64_t c = 0; c < kParts; ++c) {
      const int64_t left = p.outputs - panel * kPanel - c * kLanes;
      if (left >= kLanes) {
        store(y + c * kLanes, whole[r][c]);
      } else if (left > 0) {
        float last[kLanes];
        store(last, whole[r][c]);
        std::copy_n(last, left, y + c * kLanes);
      }
    }
  }
}

template <typename Weight, typename Numbers>
struct Kernels;
template <typename Weight, int... R>
struct Kernels<Weight, std::integer_sequence<int, R...>> {
  using Kernel = void (*)(const Product<Weight>&, int64_t, int64_t);
  static constexpr Kernel of[] = {by_panel<Weight, R + 1>...};
};

template <typename Weight>
ffi::Error by_panels(ffi::ThreadPool& pool, Matrix x, ffi::AnyBuffer weight, ffi::Result<Matrix> y) {
  using ByPanel = Kernels<Weight, std::make_integer_sequence<int, kRows>>;
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const auto* numbers = static_cast<const Weight*>(weight.untyped_data());
  const Product<Weight> p{x.typed_data(), numbers, y->typed_data(), rows, inputs, outputs};

  // Rows in groups of nearly equal size: from the second on, a panel comes from a cache.
  const int64_t groups = (rows + kRows - 1) / kRows, count = weight.dimensions()[0];
  // Four parts a thread, so that one that is held up leaves work to the others.
  const int64_t parts = std::min(4 * std::max<int64_t>(pool.num_threads(), 1), count);
  share(pool, rows * inputs * outputs, parts, [=](int64_t part) {
    for (int64_t panel = count * part / parts; panel < count * (part + 1) / parts; ++panel) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = rows * g / groups;
        ByPanel::of[rows * (g + 1) / groups - first - 1](p, first, panel);
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error panels(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer weight, ffi::Result<Matrix> y) {
  const bool narrow = weight.element_type() == ffi::BF16;
  return narrow ? by_panels<uint16_t>(pool, x, weight, y) : by_panels<float>(pool, x, weight, y);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Panels, panels,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::AnyBuffer>().Ret<Matrix>());
