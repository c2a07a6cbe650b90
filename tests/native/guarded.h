// Arrays that end where the readable memory ends: one element further, and the processor faults, whatever instruction
// it was and whether a sanitizer looked at it (it does not look at masked loads and stores).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <random>

template <class T>
class Guarded {
  public:
    explicit Guarded(std::int64_t count) : count_(count) {
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T), whole = (bytes + page - 1) / page * page;
        mapped_ = whole + 2 * page;
        base_ = static_cast<std::byte*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + page, whole, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
        data_ = reinterpret_cast<T*>(base_ + page + whole - bytes);
    }
    ~Guarded() { munmap(base_, mapped_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    Guarded& normal(unsigned seed) {
        std::mt19937 engine(seed);
        std::normal_distribution<float> draw;
        std::generate_n(data_, count_, [&] { return static_cast<T>(draw(engine)); });
        return *this;
    }

    T* data() { return data_; }
    std::int64_t size() const { return count_; }

  private:
    std::int64_t count_;
    std::size_t mapped_;
    std::byte* base_;
    T* data_;
};
