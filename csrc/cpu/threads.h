// A thread pool for work of microseconds: fork-join, one share for each thread, cut by the number of threads alone.
// Kernels are written so that their bytes do not depend on the cut, nor on who computes a share: a worker that is not
// there yet, because it sleeps or the system has given its core away, finds its share done by the caller. So a busy
// machine costs the help of other threads and no more.
//
// Between two calls the workers watch for the next one for some tens of microseconds, then sleep: an idle pool takes
// nothing from another one beside it. A pool has one owner, and one call at a time; several pools may live in one
// process.
//
// An empty call on two threads costs 0.43 us while the worker watches, and 47 us once it has to be woken; on one thread
// 0.3 ns (two cores of an AMD EPYC, Zen 4, in a virtual machine; measured on 2026-11-25 by
// benchmarks/bench_kernels.py).
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace cfrt {

class Threads {
  public:
    // The calling thread is one of the `count`; count - 1 workers are started. An Error where count < 1.
    explicit Threads(int count);
    ~Threads();
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    int count() const { return count_; }

    // Calls work(share), 0 <= share < count(), once for each share; returns when all are done. Work must not throw.
    template <class Work>
    void run(const Work& work) {
        start([](const void* w, int share) noexcept { (*static_cast<const Work*>(w))(share); }, &work);
    }

    // Calls work(begin, end) for each share of [0, items) that is not empty: contiguous, sizes differing by at most
    // one.
    template <class Work>
    void split(std::int64_t items, const Work& work) {
        if (count_ == 1 || items == 1) {
            if (items > 0) work(std::int64_t{0}, items);
            return;
        }
        run([&](int share) {
            const std::int64_t begin = items * share / count_, end = items * (share + 1) / count_;
            if (begin < end) work(begin, end);
        });
    }

  private:
    using Call = void (*)(const void* work, int share) noexcept;

    struct alignas(64) Share {
        std::atomic<std::uint32_t> round{0};  // the last in which somebody took it
    };

    void start(Call call, const void* work);
    void stop();
    void serve(int share);
    bool take(int share, std::uint32_t round);

    const int count_;
    const int patience_;  // looks before sleeping
    Call call_ = nullptr;
    const void* work_ = nullptr;
    std::atomic<bool> stopping_{false};
    std::vector<Share> shares_;
    alignas(64) std::atomic<std::uint32_t> round_{0};  // raised for each call
    alignas(64) std::atomic<int> open_{0};             // shares of the workers that are not done
    std::vector<std::thread> workers_;
};

}  // namespace cfrt
