// Work shared between the threads of a CPU device.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

// Threads that stay awake between kernels. A pass calls a kernel every few microseconds, and waking a thread of XLA's
// pool takes longer than many of them: a verify pass of 135 M parameters lost a fifth of its time so.
class Team {
 public:
  // One for the kernels of a library, or for all where the linker joins them. Never taken down: its threads may outlive
  // whatever a destructor at exit would need.
  static Team& of_process() {
    static Team* team = new Team;
    return *team;
  }

  // Runs work(0), .., work(parts - 1), by the caller and as many others as `threads` leaves.
  template <typename Work>
  void run(int64_t threads, int64_t parts, const Work& work) {
    // One call at a time: of two programs at once, the second has the threads it came with.
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads < 2 || parts < 2 || !turn.owns_lock()) {
      for (int64_t part = 0; part < parts; ++part) work(part);
      return;
    }
    for (; helpers_ < threads - 1; ++helpers_) std::thread(&Team::serve, this).detach();

    work_ = &work;
    call_ = [](const void* work, int64_t part) { (*static_cast<const Work*>(work))(part); };
    done_.store(0, std::memory_order_relaxed);
    open_.store(static_cast<uint64_t>(parts) << 32);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> held(sleep_);
      wake_.notify_all();
    }

    while (take()) {
    }
    while (done_.load(std::memory_order_acquire) < parts) std::this_thread::yield();
  }

 private:
  // How long a thread waits for the next kernel before it sleeps.
  static constexpr std::chrono::microseconds kAwake{200};

  bool waiting() const {
    const uint64_t open = open_.load(std::memory_order_acquire);
    return static_cast<uint32_t>(open) < open >> 32;
  }

  // Does one part that is left; false where none is.
  bool take() {
    uint64_t open = open_.load(std::memory_order_acquire);
    do {
      if (static_cast<uint32_t>(open) >= open >> 32) return false;
    } while (!open_.compare_exchange_weak(open, open + 1, std::memory_order_acq_rel));
    // The call cannot end, nor another begin, before this part is done.
    call_(work_, static_cast<uint32_t>(open));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void serve() {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      while (!waiting() && std::chrono::steady_clock::now() < until) pause();
      if (!waiting()) {
        std::unique_lock<std::mutex> held(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(held, [this] { return waiting(); });
        asleep_.fetch_sub(1);
      }
      while (take()) {
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // Parts of the present call in the upper half, and how many of them are taken.
  std::atomic<uint64_t> open_{0};
  std::atomic<int64_t> done_{0}, asleep_{0};
  const void* work_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  int64_t helpers_ = 0;
  std::mutex turn_, sleep_;
  std::condition_variable wake_;
};

// As `Team::run`, by the threads that XLA has; `numbers` are multiplied in all. Below so many the caller is done before
// another has begun, and on a busy machine would wait for one that was interrupted.
constexpr int64_t kWorthSharing = 1 << 18;

template <typename Work>
void share(xla::ffi::ThreadPool& pool, int64_t numbers, int64_t parts, const Work& work) {
  Team::of_process().run(numbers < kWorthSharing ? 1 : pool.num_threads(), parts, work);
}
