// Attention of a few float32 rows over what their request holds of a cache, for the rounds of a CPU.
//
// Rows q [R, W, G, N, H] see positions lowest[w]..length - 1 of keys and values [R, G, S, H], or of pages [P, C, G, H] by
// tables [R, S / C], which are read as they lie and no further, and their own block [R, J, G, H]. A row's sums are added
// in an order of their own, so that they do not depend on the other rows or requests, on pages, or on the threads.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "lanes.h"
#include "share.h"

namespace ffi = xla::ffi;

namespace {

// As in targets/attention.py: finite, so that a row without keys gives zeros and never NaN.
constexpr float kMasked = -1e30f, kFloor = kMasked / 2;

struct Call {
  const float *q, *keys, *values, *own_keys, *own_values, *within;
  const int32_t *lengths, *lowest, *tables;
  float* out;
  int64_t requests, width, groups, shared, channels, span, own, masks, page, pages;
  float scale;

  // Rows of a request that share a kv head; m = (w, n).
  int64_t rows() const { return width * shared; }

  // Row m of an array [R, W, G, N, H].
  template <typename Number>
  Number* row(Number* array, int64_t request, int64_t group, int64_t m) const {
    return array + (((request * width + m / shared) * groups + group) * shared + m % shared) * channels;
  }
};

// Keys are taken in chunks of so many, whose sums are made by themselves and then joined in their order: so they may be
// made by any thread.
constexpr int64_t kChunk = 128;

// What the rows of a request and kv head may see: the positions that it holds, and behind them its own block as if it were
// held already, so that a row's sums are added in the same order once it is.
class Keys {
 public:
  Keys(const Call& call, int64_t request, int64_t group) : c_(call), request_(request), group_(group) {
    length_ = std::clamp<int64_t>(c_.lengths[request], 0, c_.span);
    const int32_t* lowest = c_.lowest + request * c_.width;
    first_ = std::clamp<int64_t>(*std::min_element(lowest, lowest + c_.width), 0, length_) / kChunk;
  }

  int64_t chunks() const { return (length_ + c_.own + kChunk - 1) / kChunk - first_; }
  int64_t start(int64_t chunk) const { return (first_ + chunk) * kChunk; }
  int64_t count(int64_t chunk) const { return std::min(kChunk, length_ + c_.own - start(chunk)); }
  // Positions from this one on are the own block's.
  int64_t length() const { return length_; }

  // Where the keys and values of a chunk lie.
  void place(int64_t chunk, const float** keys, const float** values) const {
    const int64_t apart = c_.groups * c_.channels, own = request_ * c_.own * apart + group_ * c_.channels;
    for (int64_t j = 0, t = start(chunk); j < count(chunk); ++j, ++t) {
      const bool held = t < length_;
      const int64_t at = held ? position(t) : own + (t - length_) * apart;
      keys[j] = (held ? c_.keys : c_.own_keys) + at, values[j] = (held ? c_.values : c_.own_values) + at;
    }
  }

 private:
  // Where position t lies in keys and values.
  int64_t position(int64_t t) const {
    if (!c_.tables) return ((request_ * c_.groups + group_) * c_.span + t) * c_.channels;
    // A page that a request lacks is named beyond the pool; it holds nothing that is seen, but is read.
    const int64_t named = c_.tables[request_ * (c_.span / c_.page) + t / c_.page], page = std::min(named, c_.pages - 1);
    return ((page * c_.page + t % c_.page) * c_.groups + group_) * c_.channels;
  }

  const Call& c_;
  int64_t request_, group_, length_, first_;
};

// Memory of a thread that lasts from call to call.
constexpr int64_t kLine = 16;
struct alignas(64) Line {
  float numbers[kLine];
};
inline float* room(std::vector<Line>& lines, int64_t numbers) {
  lines.resize(std::max<size_t>(lines.size(), (numbers + kLine - 1) / kLine));
  return lines.data()->numbers;
}

// The first halves of two rows dealt out by turns, or their second ones.
#if defined(__clang__)
template <int... I>
inline Lanes dealt_out(Lanes a, Lanes b, int from, std::integer_sequence<int, I...>) {
  constexpr int half = kLanes / 2;
  return from ? __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes + half)...)
              : __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...);
}
inline Lanes dealt_out(Lanes a, Lanes b, int from) {
  return dealt_out(a, b, from, std::make_integer_sequence<int, kLanes>());
}
#else
inline Lanes dealt_out(Lanes a, Lanes b, int from) {
  const Bits i = places();
  return __builtin_shuffle(a, b, i / 2 + i % 2 * static_cast<int32_t>(kLanes) + from);
}
#endif

// As many rows as lanes become columns: as often as the lanes can be halved, each row of the first half and its fellow of
// the second are dealt out by turns.
inline void transpose(Lanes* rows) {
  constexpr int half = kLanes / 2;
  Lanes dealt[kLanes];
  for (int step = 1; step < kLanes; step *= 2) {
    for (int i = 0; i < half; ++i) {
      dealt[2 * i] = dealt_out(rows[i], rows[i + half], 0);
      dealt[2 * i + 1] = dealt_out(rows[i], rows[i + half], half);
    }
    std::copy_n(dealt, kLanes, rows);
  }
}

// Keys channel by channel, [tile][H][lanes], so that a product takes a tile of them at once; zeros past the last.
void turn(const float* const* keys, int64_t count, int64_t channels, float* turned) {
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t h = 0; h < channels; h += kLanes) {
      Lanes rows[kLanes] = {};
      for (int64_t j = 0; j < std::min(kLanes, count - i); ++j) rows[j] = load(keys[i + j] + h);
      transpose(rows);
      for (int64_t j = 0; j < kLanes; ++j) store(turned + i * channels + (h + j) * kLanes, rows[j]);
    }
  }
}

// Scores of R rows with tiles of turned keys, two at a time for want of rows.
template <int R>
void score(const Call& c, const float* const* q, const float* turned, int64_t tiles, float* scores) {
  for (int64_t i = 0; i < tiles; i += 2) {
    const float* one = turned + i * c.channels * kLanes;
    // The last of an odd number is its own fellow.
    const float* two = i + 1 < tiles ? one + c.channels * kLanes : one;
    Lanes first[R] = {}, second[R] = {};
    for (int64_t h = 0; h < c.channels; ++h) {
      const Lanes a = load(one + h * kLanes), b = load(two + h * kLanes);
      for (int r = 0; r < R; ++r) first[r] += q[r][h] * a, second[r] += q[r][h] * b;
    }
    for (int r = 0; r < R; ++r) {
      store(scores + r * kChunk + i * kLanes, first[r] * c.scale);
      if (i + 1 < tiles) store(scores + r * kChunk + (i + 1) * kLanes, second[r] * c.scale);
    }
  }
}

// Sums [R, H] of values by the weights of R rows.
template <int R>
void weigh(const Call& c, const float* const* values, int64_t count, const float* weights, float* sums) {
  for (int64_t h = 0; h < c.channels; h += 2 * kLanes) {
    const bool both = h + kLanes < c.channels;
    Lanes first[R] = {}, second[R] = {};
    for (int64_t j = 0; j < count; ++j) {
      const Lanes a = load(values[j] + h), b = both ? load(values[j] + h + kLanes) : Lanes{};
      for (int r = 0; r < R; ++r) first[r] += weights[r * kChunk + j] * a, second[r] += weights[r * kChunk + j] * b;
    }
    for (int r = 0; r < R; ++r) {
      store(sums + r * c.channels + h, first[r]);
      if (both) store(sums + r * c.channels + h + kLanes, second[r]);
    }
  }
}

// Rows that are multiplied together, as many as fit the registers.
using Score = void (*)(const Call&, const float* const*, const float*, int64_t, float*);
using Weigh = void (*)(const Call&, const float* const*, int64_t, const float*, float*);
constexpr int64_t kRows = 6;
constexpr Score kScore[kRows] = {score<1>, score<2>, score<3>, score<4>, score<5>, score<6>};
constexpr Weigh kWeigh[kRows] = {weigh<1>, weigh<2>, weigh<3>, weigh<4>, weigh<5>, weigh<6>};

// What rows have of some keys: the largest score, the sum of the weights, and of the values by them [M, H].
struct Sums {
  float *top, *total, *values;

  // Numbers of them; a whole line of the cache begins the next.
  static int64_t size(const Call& c) { return (c.rows() * (c.channels + 2) + kLine - 1) / kLine * kLine; }
  static Sums in(float* at, const Call& c) {
    float* top = at + c.rows() * c.channels;
    return {top, top + c.rows(), at};
  }
};

// Hides from row m of a chunk what it does not see, and adds the mask of the own block.
void mask(const Call& c, const Keys& keys, int64_t request, int64_t chunk, int64_t m, float* scores) {
  const int64_t w = m / c.shared, start = keys.start(chunk), count = keys.count(chunk);
  const int64_t held = std::clamp<int64_t>(keys.length() - start, 0, count);
  for (int64_t j = 0; j < std::min<int64_t>(c.lowest[request * c.width + w] - start, held); ++j) scores[j] = kMasked;
  const float* within = c.within + ((request % c.masks) * c.width + w) * c.own + start - keys.length();
  for (int64_t j = held; j < count; ++j) scores[j] += within[j];
  std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, kMasked);
}

// The sums of all rows of a request and kv head over one chunk.
void over_chunk(const Call& c, const Keys& keys, int64_t request, int64_t group, int64_t chunk, Sums made) {
  const float *at[kChunk], *values[kChunk];
  keys.place(chunk, at, values);
  static thread_local std::vector<Line> lines;
  float* turned = room(lines, kChunk * c.channels);
  turn(at, keys.count(chunk), c.channels, turned);

  const int64_t tiles = (keys.count(chunk) + kLanes - 1) / kLanes, blocks = (c.rows() + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = c.rows() * block / blocks, count = c.rows() * (block + 1) / blocks - from;
    const float* q[kRows];
    for (int64_t r = 0; r < count; ++r) q[r] = c.row(c.q, request, group, from + r);
    alignas(64) float scores[kRows * kChunk];
    kScore[count - 1](c, q, turned, tiles, scores);

    for (int64_t r = 0; r < count; ++r) {
      float* row = scores + r * kChunk;
      mask(c, keys, request, chunk, from + r, row);
      Lanes most = Lanes{} + kFloor, sum{};
      for (int64_t i = 0; i < tiles; ++i) {
        const Lanes here = load(row + i * kLanes);
        most = here > most ? here : most;
      }
      const float top = reduced(most, [](float a, float b) { return std::max(a, b); });
      for (int64_t i = 0; i < tiles; ++i) {
        const Lanes weight = exponential(load(row + i * kLanes) - top);
        store(row + i * kLanes, weight), sum += weight;
      }
      made.top[from + r] = top;
      made.total[from + r] = total(sum);
    }
    kWeigh[count - 1](c, values, keys.count(chunk), scores, made.values + from * c.channels);
  }
}

// Adds a chunk's sums to those of the chunks before it.
void join(const Call& c, const Sums& more, Sums whole) {
  for (int64_t m = 0; m < c.rows(); ++m) {
    const float top = std::max(whole.top[m], more.top[m]);
    const float mine = exponential(Lanes{} + (whole.top[m] - top))[0], its = exponential(Lanes{} + (more.top[m] - top))[0];
    float *sums = whole.values + m * c.channels, *added = more.values + m * c.channels;
    for (int64_t h = 0; h < c.channels; h += kLanes) store(sums + h, load(sums + h) * mine + load(added + h) * its);
    whole.total[m] = whole.total[m] * mine + more.total[m] * its, whole.top[m] = top;
  }
}

void finish(const Call& c, int64_t request, int64_t group, const Sums& sums) {
  for (int64_t m = 0; m < c.rows(); ++m) {
    float* row = c.row(c.out, request, group, m);
    const float scale = sums.total[m] > 0 ? 1.0f / sums.total[m] : 0.0f;
    for (int64_t h = 0; h < c.channels; h += kLanes) store(row + h, load(sums.values + m * c.channels + h) * scale);
  }
}

// A request and kv head as a whole, by one thread.
void attend(const Call& c, int64_t request, int64_t group) {
  static thread_local std::vector<Line> lines;
  float* sums = room(lines, 2 * Sums::size(c));
  const Sums whole = Sums::in(sums, c), more = Sums::in(sums + Sums::size(c), c);

  const Keys keys(c, request, group);
  over_chunk(c, keys, request, group, 0, whole);
  for (int64_t chunk = 1; chunk < keys.chunks(); ++chunk) {
    over_chunk(c, keys, request, group, chunk, more);
    join(c, more, whole);
  }
  finish(c, request, group, whole);
}

// Sums of chunks side by side, in numbers, that a thread keeps room for. Prompts have more, and rows enough for one thread
// a kv head.
constexpr int64_t kMostSums = 1 << 22;

// The same by many threads: all chunks side by side, then their sums.
void attend_divided(ffi::ThreadPool& pool, const Call& c, int64_t work) {
  struct Part {
    int64_t request, group, chunk;
  };
  std::vector<Part> parts;
  for (int64_t request = 0; request < c.requests; ++request)
    for (int64_t group = 0; group < c.groups; ++group)
      for (int64_t chunk = 0; chunk < Keys(c, request, group).chunks(); ++chunk) parts.push_back({request, group, chunk});

  static thread_local std::vector<Line> lines;
  float* sums = room(lines, parts.size() * Sums::size(c));
  share(pool, work, parts.size(), [&parts, &c, sums](int64_t i) {
    const auto [request, group, chunk] = parts[i];
    over_chunk(c, Keys(c, request, group), request, group, chunk, Sums::in(sums + i * Sums::size(c), c));
  });

  for (size_t i = 0; i < parts.size();) {
    const auto [request, group, chunk] = parts[i];
    const Sums whole = Sums::in(sums + i * Sums::size(c), c);
    for (++i; i < parts.size() && parts[i].chunk; ++i) join(c, Sums::in(sums + i * Sums::size(c), c), whole);
    finish(c, request, group, whole);
  }
}

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
  int64_t held = 0;
  for (int64_t r = 0; r < call.requests; ++r) held += std::min<int64_t>(call.lengths[r], call.span);
  const int64_t pairs = call.requests * call.groups, work = held * call.groups * call.rows() * call.channels;

  const int64_t chunks = (held + call.requests * call.own) / kChunk + 2 * call.requests;
  const bool divided = pairs < 4 * pool.num_threads() && chunks * call.groups * Sums::size(call) <= kMostSums;
  if (work < kWorthSharing) {
    for (int64_t i = 0; i < pairs; ++i) attend(call, i / call.groups, i % call.groups);
  } else if (divided) {
    attend_divided(pool, call, work);
  } else {
    share(pool, work, pairs, [&call](int64_t i) { attend(call, i / call.groups, i % call.groups); });
  }
  return ffi::Error::Success();
}

// Whether any of so many numbers is infinite or none at all.
bool unsound(const float* numbers, int64_t count) {
  Bits found{};
  for (int64_t i = 0; i < count; i += kLanes) found |= ((Bits)load(numbers + i) & 0x7f800000) == 0x7f800000;
  int32_t any = 0;
  for (int64_t i = 0; i < kLanes; ++i) any |= found[i];
  return any != 0;
}

// As `run`; a row whose own key or value is not finite gives NaN, and the others see zeros there.
ffi::Error run_apart(ffi::ThreadPool& pool, Call call) {
  if (call.own != call.width) return ffi::Error::InvalidArgument("A block's own keys must be as many as its rows.");
  const int64_t size = call.groups * call.channels, rows = call.requests * call.own;
  if (!unsound(call.own_keys, rows * size) && !unsound(call.own_values, rows * size)) return run(pool, call);

  std::vector<float> keys(call.own_keys, call.own_keys + rows * size);
  std::vector<float> values(call.own_values, call.own_values + rows * size);
  std::vector<int64_t> failed;
  for (int64_t row = 0; row < rows; ++row) {
    if (!unsound(call.own_keys + row * size, size) && !unsound(call.own_values + row * size, size)) continue;
    std::fill_n(keys.begin() + row * size, size, 0.0f), std::fill_n(values.begin() + row * size, size, 0.0f);
    failed.push_back(row);
  }
  call.own_keys = keys.data(), call.own_values = values.data();
  const ffi::Error made = run(pool, call);
  for (int64_t row : failed)
    std::fill_n(call.out + row * size * call.shared, size * call.shared, std::numeric_limits<float>::quiet_NaN());
  return made;
}

ffi::Error held_rows(ffi::ThreadPool pool, Five q, Four keys, Four values, Lengths lengths, Four own_keys,
                     Four own_values, Bounds lowest, Three within, ffi::Result<Five> out, float scale, bool apart) {
  const Call call = call_of(q, keys, values, lengths, own_keys, own_values, lowest, within, out, scale);
  return apart ? run_apart(pool, call) : run(pool, call);
}

ffi::Error held_rows_of_pages(ffi::ThreadPool pool, Five q, Four keys, Four values, Lengths lengths, Four own_keys,
                              Four own_values, Bounds lowest, Three within, Bounds tables, ffi::Result<Five> out,
                              float scale, bool apart) {
  Call call = call_of(q, keys, values, lengths, own_keys, own_values, lowest, within, out, scale);
  call.tables = tables.typed_data();
  call.pages = keys.dimensions()[0];
  call.page = keys.dimensions()[1];
  call.span = tables.dimensions()[1] * call.page;
  return apart ? run_apart(pool, call) : run(pool, call);
}

}  // namespace

#define DSPARK_OPERANDS                                                                                              \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Five>().Arg<Four>().Arg<Four>().Arg<Lengths>().Arg<Four>().Arg<Four>() \
      .Arg<Bounds>().Arg<Three>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(HeldRows, held_rows, DSPARK_OPERANDS.Ret<Five>().Attr<float>("scale").Attr<bool>("apart"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(HeldRowsOfPages, held_rows_of_pages,
                              DSPARK_OPERANDS.Arg<Bounds>().Ret<Five>().Attr<float>("scale").Attr<bool>("apart"));
