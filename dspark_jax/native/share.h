// Work shared between the threads of a CPU device.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

// Runs work(0), .., work(parts - 1). Parts are claimed one by one, and the caller claims them too: it waits for none
// that has not begun, so that a pool whose threads all wait here cannot stand still.
template <typename Work>
void share(xla::ffi::ThreadPool& pool, int64_t parts, Work work) {
  struct Count {
    std::atomic<int64_t> claimed{0}, done{0};
  };
  auto count = std::make_shared<Count>();
  auto run = [count, parts, work] {
    for (int64_t part; (part = count->claimed.fetch_add(1)) < parts;) {
      work(part);
      count->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = std::min(pool.num_threads(), parts) - 1; i > 0; --i) pool.Schedule(std::decay_t<decltype(run)>(run));
  run();
  while (count->done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
}
