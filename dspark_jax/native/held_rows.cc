// Attention of a few float32 rows over what their request holds of a cache, for the rounds of a CPU.
//
// Rows q [R, W, G, N, H] see positions lowest[w]..length - 1 of keys and values [R, G, S, H], or of pages [P, C, G, H] by
// tables [R, S / C], which are read as they lie and no further, and their own block [R, J, G, H]. A row's sums are added
// in an order of their own, so that they do not depend on the other rows or requests, on pages, or on the threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "share.h"

namespace ffi = xla::ffi;

namespace {

// Sixteen numbers; compilers split them for CPUs with shorter vectors.
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLanes = 16, kMostChannels = 512;
// As in targets/attention.py: finite, so that a row without keys gives zeros and never NaN.
constexpr float kMasked = -1e30f, kFloor = kMasked / 2;

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes lanes) { *reinterpret_cast<Lanes*>(to) = lanes; }

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

template <typename Combine>
inline float reduced(Lanes lanes, Combine combine) {
  float parts[kLanes];
  store(parts, lanes);
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] = combine(parts[i], parts[i + half]);
  return parts[0];
}

struct Call {
  const float *q, *keys, *values, *own_keys, *own_values, *within;
  const int32_t *lengths, *lowest, *tables;
  float* out;
  int64_t requests, width, groups, shared, channels, span, own, masks, page, pages;
  float scale;
};

// The rows of a request that share a kv head.
class Rows {
 public:
  Rows(const Call& call, int64_t request, int64_t group)
      : c_(call), request_(request), group_(group), top_(call.width * call.shared, kFloor), total_(top_.size(), 0.0f) {}

  void run() {
    for (int64_t m = 0; m < count(); ++m) std::fill_n(place(c_.out, m), c_.channels, 0.0f);

    // The own block first: some of its keys are there for every row.
    const int64_t apart = c_.groups * c_.channels, at = request_ * c_.own * apart + group_ * c_.channels;
    for (int64_t j = 0; j < c_.own; j += kLanes)
      add(c_.own_keys + at + j * apart, c_.own_values + at + j * apart, apart, std::min(kLanes, c_.own - j), j, true);

    // Positions by sixteens, from the first that a row sees on.
    const int64_t length = std::min<int64_t>(c_.lengths[request_], c_.span);
    const int32_t* lowest = c_.lowest + request_ * c_.width;
    const int64_t first = std::max<int64_t>(*std::min_element(lowest, lowest + c_.width), 0) / kLanes * kLanes;
    for (int64_t t = first; t < length; t += kLanes) {
      const int64_t from = position(t), next = c_.tables ? apart : c_.channels;
      add(c_.keys + from, c_.values + from, next, std::min(kLanes, length - t), t, false);
    }

    for (int64_t m = 0; m < count(); ++m) {
      float* row = place(c_.out, m);
      const float scale = total_[m] > 0 ? 1.0f / total_[m] : 0.0f;
      for (int64_t h = 0; h < c_.channels; h += kLanes) store(row + h, load(row + h) * scale);
    }
  }

 private:
  int64_t count() const { return top_.size(); }

  // Where position t lies in keys and values; pages hold whole sixteens.
  int64_t position(int64_t t) const {
    if (!c_.tables) return ((request_ * c_.groups + group_) * c_.span + t) * c_.channels;
    // A page that a request lacks is named beyond the pool; it holds nothing that is seen, but is read.
    const int64_t named = c_.tables[request_ * (c_.span / c_.page) + t / c_.page], page = std::min(named, c_.pages - 1);
    return ((page * c_.page + t % c_.page) * c_.groups + group_) * c_.channels;
  }

  // Row m = (w, n) of an array [R, W, G, N, H].
  template <typename Number>
  Number* place(Number* array, int64_t m) const {
    const int64_t w = m / c_.shared, n = m % c_.shared;
    return array + (((request_ * c_.width + w) * c_.groups + group_) * c_.shared + n) * c_.channels;
  }

  // Adds up to sixteen keys, `apart` numbers from one another, to the sums of all rows.
  void add(const float* keys, const float* values, int64_t apart, int64_t taken, int64_t at, bool own) {
    // Channel by channel, so that a product takes sixteen keys at once.
    alignas(64) float turned[kMostChannels * kLanes];
    for (int64_t j = 0; j < kLanes; ++j)
      for (int64_t h = 0; h < c_.channels; ++h) turned[h * kLanes + j] = j < taken ? keys[j * apart + h] : 0.0f;

    for (int64_t m = 0; m < count(); ++m) {
      const int64_t w = m / c_.shared;
      const float* q = place(c_.q, m);
      Lanes even{}, odd{};
      for (int64_t h = 0; h < c_.channels; h += 2) {
        even += q[h] * load(turned + h * kLanes);
        odd += q[h + 1] * load(turned + (h + 1) * kLanes);
      }

      alignas(64) float scores[kLanes];
      store(scores, (even + odd) * c_.scale);
      for (int64_t j = 0; j < kLanes; ++j) {
        const bool seen = j < taken && (own || at + j >= c_.lowest[request_ * c_.width + w]);
        if (!seen) scores[j] = kMasked;
        else if (own) scores[j] += c_.within[((request_ % c_.masks) * c_.width + w) * c_.own + at + j];
      }
      weigh(m, load(scores), values, apart, taken);
    }
  }

  // Adds values by their scores to the sums of row m.
  void weigh(int64_t m, Lanes scores, const float* values, int64_t apart, int64_t taken) {
    float* row = place(c_.out, m);
    const float top = std::max(top_[m], reduced(scores, [](float a, float b) { return std::max(a, b); }));
    if (top > top_[m]) {
      const float less = exponential(Lanes{} + (top_[m] - top))[0];
      for (int64_t h = 0; h < c_.channels; h += kLanes) store(row + h, load(row + h) * less);
      total_[m] *= less, top_[m] = top;
    }

    alignas(64) float weights[kLanes];
    store(weights, exponential(scores - top));
    total_[m] += reduced(load(weights), [](float a, float b) { return a + b; });
    for (int64_t h = 0; h < c_.channels; h += kLanes) {
      Lanes sum = load(row + h);
      for (int64_t j = 0; j < taken; ++j) sum += weights[j] * load(values + j * apart + h);
      store(row + h, sum);
    }
  }

  const Call& c_;
  const int64_t request_, group_;
  std::vector<float> top_, total_;
};

using Five = ffi::Buffer<ffi::F32, 5>;
using Four = ffi::Buffer<ffi::F32, 4>;
using Three = ffi::Buffer<ffi::F32, 3>;
using Lengths = ffi::Buffer<ffi::S32, 1>;
using Bounds = ffi::Buffer<ffi::S32, 2>;

Call call_of(Five q, Four keys, Four values, Lengths lengths, Four own_keys, Four own_values, Bounds lowest, Three within,
             ffi::Result<Five> out, float scale) {
  const auto rows = q.dimensions();
  return {q.typed_data(), keys.typed_data(), values.typed_data(), own_keys.typed_data(), own_values.typed_data(),
          within.typed_data(), lengths.typed_data(), lowest.typed_data(), nullptr, out->typed_data(), rows[0], rows[1],
          rows[2], rows[3], rows[4], keys.dimensions()[2], own_keys.dimensions()[1], within.dimensions()[0], 0, 0, scale};
}

ffi::Error run(ffi::ThreadPool& pool, const Call& call) {
  const int64_t parts = call.requests * call.groups;
  const auto part = [&call](int64_t i) { Rows(call, i / call.groups, i % call.groups).run(); };

  // Waking a thread takes longer than a short context.
  int64_t held = 0;
  for (int64_t r = 0; r < call.requests; ++r) held += std::min<int64_t>(call.lengths[r], call.span);
  if (held * call.groups * call.width * call.shared * call.channels < (1 << 20)) {
    for (int64_t i = 0; i < parts; ++i) part(i);
  } else {
    share(pool, parts, part);
  }
  return ffi::Error::Success();
}

ffi::Error held_rows(ffi::ThreadPool pool, Five q, Four keys, Four values, Lengths lengths, Four own_keys,
                     Four own_values, Bounds lowest, Three within, ffi::Result<Five> out, float scale) {
  return run(pool, call_of(q, keys, values, lengths, own_keys, own_values, lowest, within, out, scale));
}

ffi::Error held_rows_of_pages(ffi::ThreadPool pool, Five q, Four keys, Four values, Lengths lengths, Four own_keys,
                              Four own_values, Bounds lowest, Three within, Bounds tables, ffi::Result<Five> out,
                              float scale) {
  Call call = call_of(q, keys, values, lengths, own_keys, own_values, lowest, within, out, scale);
  call.tables = tables.typed_data();
  call.pages = keys.dimensions()[0];
  call.page = keys.dimensions()[1];
  call.span = tables.dimensions()[1] * call.page;
  return run(pool, call);
}

}  // namespace

#define DSPARK_OPERANDS                                                                                              \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Five>().Arg<Four>().Arg<Four>().Arg<Lengths>().Arg<Four>().Arg<Four>() \
      .Arg<Bounds>().Arg<Three>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(HeldRows, held_rows, DSPARK_OPERANDS.Ret<Five>().Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(HeldRowsOfPages, held_rows_of_pages,
                              DSPARK_OPERANDS.Arg<Bounds>().Ret<Five>().Attr<float>("scale"));
