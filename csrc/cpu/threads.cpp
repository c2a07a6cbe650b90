#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../check.h"

namespace cfrt {
namespace {

constexpr int kPatience = 2000;  // pauses of 10 to 40 ns

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns once `value` is not `old`, having seen all that was written before it changed.
template <class T>
void wait_for_change(const std::atomic<T>& value, T old, int patience) {
    for (int look = 0; look < patience; ++look) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    value.wait(old, std::memory_order_acquire);
}

int checked(int count) {
    check(count >= 1, "expected threads >= 1, got ", count);
    return count;
}

}  // namespace

Threads::Threads(int count)
    : count_(checked(count)),
      // With more threads than cores, watching keeps others from working.
      patience_(count <= static_cast<int>(std::thread::hardware_concurrency()) ? kPatience : 0),
      shares_(static_cast<std::size_t>(count)) {
    workers_.reserve(static_cast<std::size_t>(count - 1));
    try {
        for (int share = 1; share < count; ++share) workers_.emplace_back([this, share] { serve(share); });
    } catch (...) {  // the system has no thread left for us
        stop();
        throw;
    }
}

Threads::~Threads() {
    stop();
}

void Threads::start(Call call, const void* work) {
    if (workers_.empty()) return call(work, 0);
    call_ = call, work_ = work;
    open_.store(count_ - 1, std::memory_order_relaxed);
    const std::uint32_t round = round_.fetch_add(1, std::memory_order_release) + 1;
    round_.notify_all();
    call(work, 0);
    for (int share = count_ - 1; share > 0; --share) {
        if (!take(share, round)) continue;
        call(work, share);
        open_.fetch_sub(1, std::memory_order_relaxed);
    }
    for (int left; (left = open_.load(std::memory_order_acquire)) != 0;) wait_for_change(open_, left, patience_);
}

void Threads::stop() {
    stopping_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

// Every share of a round is taken once, by its worker or by the caller, before the next round begins: a worker that
// comes late, even by several rounds, finds that its round is over.
bool Threads::take(int share, std::uint32_t round) {
    std::uint32_t before = round - 1;
    return shares_[static_cast<std::size_t>(share)].round.compare_exchange_strong(before, round,
                                                                                  std::memory_order_acquire);
}

void Threads::serve(int share) {
    for (std::uint32_t seen = 0;;) {
        wait_for_change(round_, seen, patience_);
        seen = round_.load(std::memory_order_acquire);
        if (stopping_) return;
        if (!take(share, seen)) continue;
        call_(work_, share);
        if (open_.fetch_sub(1, std::memory_order_acq_rel) == 1) open_.notify_one();
    }
}

}  // namespace cfrt
