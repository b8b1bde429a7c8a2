// Threads that do one thing after the other together, without sleeping in between.
#pragma once

#include <atomic>
#include <sched.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

class Team {
  public:
    explicit Team(int size) : size_(size) {}

    // The next of so many tasks, or -1: there is none left. Who is held up by other work on its core takes fewer.
    int take(int tasks) {
        const int task = next_.fetch_add(1, std::memory_order_relaxed);
        return task < tasks ? task : -1;
    }

    // Until all have come here: all tasks are done, and what they wrote is seen.
    void wait() {
        const unsigned turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; turn_.load(std::memory_order_acquire) == turn; looks++) {
            if (looks < LOOKS)
                pause();
            else
                sched_yield();
        }
    }

    // `work(task)` for each task, by all members together.
    template <typename Work>
    void share(int tasks, const Work &work) {
        for (int task; (task = take(tasks)) >= 0;) work(task);
        wait();
    }

    int size() const { return size_; }

  private:
    // Some 20 microseconds; who waits longer than that waits for somebody who has lost its core.
    static constexpr int LOOKS = 1000;

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        _mm_pause();
#endif
    }

    const int size_;
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> turn_{0};
};

}  // namespace
