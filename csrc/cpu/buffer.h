// Memory for weights, arenas and rings: aligned to cache lines, zeroed, on huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cfrt {

class Buffer {
  public:
    Buffer() = default;

    explicit Buffer(std::size_t bytes) : size_(bytes) {
        if (bytes == 0) return;
        const std::size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
        const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
        data_ = static_cast<std::byte*>(std::aligned_alloc(alignment, whole));
        if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
        if (bytes >= kHugePage) madvise(data_, whole, MADV_HUGEPAGE);  // a hint; small pages do as well
#endif
        std::memset(data_, 0, whole);
    }

    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer() { std::free(data_); }

    std::size_t size() const { return size_; }
    std::byte* data() { return data_; }
    const std::byte* data() const { return data_; }

    template <class T>
    T* as(std::size_t byte_offset = 0) {
        return reinterpret_cast<T*>(data_ + byte_offset);
    }
    template <class T>
    const T* as(std::size_t byte_offset = 0) const {
        return reinterpret_cast<const T*>(data_ + byte_offset);
    }

  private:
    static constexpr std::size_t kCacheLine = 64, kHugePage = std::size_t{2} << 20;

    void swap(Buffer& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }

    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace cfrt
