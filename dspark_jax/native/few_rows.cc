// Products of a few float32 rows by a weight, for the rounds of a CPU: x [N, K] by W [K, O], or by a table [O, K].
//
// Such a product is bound by reading the weight. It is read once, as it lies, with the next lines on their way from
// memory while those at hand are multiplied; nothing is packed. A row's sums are added in an order of their own, so that
// they do not depend on the other rows, on their number, or on the threads.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "lanes.h"
#include "share.h"

namespace ffi = xla::ffi;

namespace {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::Result<Matrix>;

// One product: N rows of `x`, the weight, and the result, with the sizes of an axis each.
struct Product {
  const float* x;
  const float* weight;
  float* y;
  int64_t rows, inputs, outputs;
};

// By W [K, O]

// Columns are taken in tiles of nearly equal width, at most this, whose sums stay in the first cache.
constexpr int64_t kTile = 288;
// Rows of the weight between the one that is multiplied and the one that is sent for.
constexpr int64_t kAhead = 8;

// Adds rows k..k+D-1 of a tile of the weight to the sums [R, tile]. The sums' rows are a little further apart than the
// tile is wide: apart by a power of two, they would take one another for the same address.
template <int R, int D>
inline void add_rows(const Product& p, int64_t first, const float* tile, int64_t k, int64_t width, float* sums) {
  const float* x = p.x + first * p.inputs + k;
  for (int64_t c = 0; c < width; c += kLanes) {
    Lanes sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load(sums + r * (kTile + kLanes) + c);
    for (int d = 0; d < D; ++d) {
      // Past the last rows this asks for memory behind the weight, which a prefetch may.
      __builtin_prefetch(tile + (k + d + kAhead) * p.outputs + c);
      const Lanes part = load(tile + (k + d) * p.outputs + c);
      for (int r = 0; r < R; ++r) sum[r] += x[r * p.inputs + d] * part;
    }
    for (int r = 0; r < R; ++r) store(sums + r * (kTile + kLanes) + c, sum[r]);
  }
}

// R rows of the result from row `first` on, in the columns of a tile.
template <int R>
void by_weight(const Product& p, int64_t first, int64_t from, int64_t to) {
  // As many rows of the weight at a time as have their factors in registers.
  constexpr int depth = R <= 5 ? 8 : 4;
  alignas(64) float sums[R * (kTile + kLanes)] = {};

  int64_t k = 0;
  for (; k + depth <= p.inputs; k += depth) add_rows<R, depth>(p, first, p.weight + from, k, to - from, sums);
  for (; k < p.inputs; ++k) add_rows<R, 1>(p, first, p.weight + from, k, to - from, sums);

  for (int r = 0; r < R; ++r)
    std::copy_n(sums + r * (kTile + kLanes), to - from, p.y + (first + r) * p.outputs + from);
}

// By a table [O, K]

// Rows of the table at a time, as many as have their sums in registers, and between the one that is multiplied and the
// one that is sent for.
#if defined(__AVX512F__)
constexpr int64_t kTogether = 4, kTogetherAhead = 4;
#else
constexpr int64_t kTogether = 2, kTogetherAhead = 4;
#endif

template <int R, int D>
inline void multiply_rows(const Product& p, int64_t first, int64_t at) {
  Lanes sum[R][D] = {};
  for (int64_t k = 0; k < p.inputs; k += kLanes) {
    for (int d = 0; d < D; ++d) {
      __builtin_prefetch(p.weight + (at + d + kTogetherAhead) * p.inputs + k);
      const Lanes part = load(p.weight + (at + d) * p.inputs + k);
      for (int r = 0; r < R; ++r) sum[r][d] += part * load(p.x + (first + r) * p.inputs + k);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) p.y[(first + r) * p.outputs + at + d] = total(sum[r][d]);
}

template <int R>
void by_table(const Product& p, int64_t first, int64_t from, int64_t to) {
  int64_t at = from;
  for (; at + kTogether <= to; at += kTogether) multiply_rows<R, kTogether>(p, first, at);
  for (; at < to; ++at) multiply_rows<R, 1>(p, first, at);
}

// Rows in groups that fit the registers

using Kernel = void (*)(const Product&, int64_t, int64_t, int64_t);
template <typename Numbers>
struct Kernels;
template <int... R>
struct Kernels<std::integer_sequence<int, R...>> {
  static constexpr int64_t count = sizeof...(R);
  static constexpr Kernel weight[] = {by_weight<R + 1>...}, table[] = {by_table<R + 1>...};
};
using ByWeight = Kernels<std::make_integer_sequence<int, 10>>;
using ByTable = Kernels<std::make_integer_sequence<int, 5>>;

// All rows of the columns from..to, in groups of nearly equal size: from the second on the weight comes from a cache.
void all_rows(const Product& p, const Kernel* kernels, int64_t most, int64_t step, int64_t from, int64_t to) {
  const int64_t groups = (p.rows + most - 1) / most;
  for (int64_t left = from; left < to; left += step) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = p.rows * g / groups, count = p.rows * (g + 1) / groups - first;
      kernels[count - 1](p, first, left, std::min(left + step, to));
    }
  }
}

ffi::Error divided(ffi::ThreadPool& pool, const Product& p, const Kernel* kernels, int64_t most, int64_t step) {
  // Four parts a thread where there are as many, so that one that is held up leaves work to the others.
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), steps = (p.outputs + step - 1) / step;
  const int64_t parts = threads == 1 ? 1 : std::min(4 * threads, steps);
  share(pool, p.rows * p.inputs * p.outputs, parts, [=](int64_t part) {
    const int64_t from = steps * part / parts * step, to = std::min(steps * (part + 1) / parts * step, p.outputs);
    all_rows(p, kernels, most, step, from, to);
  });
  return ffi::Error::Success();
}

ffi::Error few_rows(ffi::ThreadPool pool, Matrix x, Matrix weight, Result y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = weight.dimensions()[1];
  const Product product{x.typed_data(), weight.typed_data(), y->typed_data(), rows, inputs, outputs};
  const int64_t tiles = (outputs + kTile - 1) / kTile, lanes = (outputs / tiles + kLanes - 1) / kLanes;
  return divided(pool, product, ByWeight::weight, ByWeight::count, std::min(lanes * kLanes, kTile));
}

ffi::Error few_rows_of_table(ffi::ThreadPool pool, Matrix x, Matrix table, Result y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = table.dimensions()[0];
  const Product product{x.typed_data(), table.typed_data(), y->typed_data(), rows, inputs, outputs};
  return divided(pool, product, ByTable::table, ByTable::count, 64);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, few_rows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsOfTable, few_rows_of_table,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());
