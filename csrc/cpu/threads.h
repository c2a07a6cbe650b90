// A thread pool for work of microseconds: fork-join, static shares. No queue, no stealing: which thread computes what
// follows from the number of threads alone, and kernels are written so that their bytes do not depend on it.
//
// Between two calls the workers watch for the next one for some tens of microseconds, then sleep: an idle pool takes
// nothing from another one beside it. A pool has one owner, and one call at a time; several pools may live in one
// process.
//
// An empty call on two threads costs 0.43 us while the worker watches, and 47 us once it has to be woken; on one thread
// 0.3 ns (benchmarks/bench_kernels.py on two cores of an AMD EPYC, Zen 4, in a virtual machine; measured on
// 2026-11-25).
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

    // Calls work(thread), 0 <= thread < count(), once on each thread; returns when all have. Work must not throw.
    template <class Work>
    void run(const Work& work) {
        start([](const void* w, int thread) noexcept { (*static_cast<const Work*>(w))(thread); }, &work);
    }

    // Calls work(begin, end) on each thread that has a share of [0, items): contiguous, sizes differing by at most one.
    template <class Work>
    void split(std::int64_t items, const Work& work) {
        if (count_ == 1 || items == 1) {
            if (items > 0) work(std::int64_t{0}, items);
            return;
        }
        run([&](int thread) {
            const std::int64_t begin = items * thread / count_, end = items * (thread + 1) / count_;
            if (begin < end) work(begin, end);
        });
    }

  private:
    using Call = void (*)(const void* work, int thread) noexcept;

    void start(Call call, const void* work);
    void stop();
    void serve(int thread);

    const int count_;
    const int patience_;  // looks before sleeping
    Call call_ = nullptr;
    const void* work_ = nullptr;
    bool stopping_ = false;
    alignas(64) std::atomic<std::uint32_t> round_{0};  // raised for each call
    alignas(64) std::atomic<int> busy_{0};             // workers still at it
    std::vector<std::thread> workers_;
};

}  // namespace cfrt
