// Buffers that live as long as the calling thread, so that a call allocates nothing after the first few.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace partinfer {

// Hands out 64-byte aligned pieces of one block. reserve() first, with the sum of all sizes.
class Scratch {
 public:
  ~Scratch() { std::free(block_); }

  static constexpr size_t padded(size_t bytes) { return (bytes + 255) / 64 * 64; }

  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(block_);
    size_ = padded(bytes);
    block_ = static_cast<char*>(std::aligned_alloc(64, size_));
    if (block_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }

  // count elements, and at least PAD bytes behind them that may be read.
  template <class T>
  T* take(int64_t count) {
    char* piece = block_ + used_;
    used_ += padded(size_t(count) * sizeof(T));
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace partinfer
