// A hash table for what drafting looks up at every node: 64-bit keys, each with a row of 32-bit words beside it, so that a
// look-up reads one stretch of memory, which can be fetched before it is needed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace shoestring {

inline void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

// Open addressing with linear probing.
class FlatTable {
 public:
  explicit FlatTable(size_t width) : width_(width) { clear(); }

  void clear() {
    words_.assign(kLeast * stride(), 0);
    mask_ = kLeast - 1;
    used_ = 0;
  }

  size_t width() const { return width_; }
  size_t size() const { return used_; }

  // Ask for a key's row ahead of time.
  void prefetch(uint64_t key) const {
    const int32_t* head = &words_[home(key) * stride()];
    shoestring::prefetch(head);
    shoestring::prefetch(head + stride() - 1);
  }

  // The key's row, or null.
  const int32_t* find(uint64_t key) const {
    const size_t slot = slot_of(key);
    return words_[slot * stride()] ? &words_[slot * stride() + kHead] : nullptr;
  }

  // The key's row, zeros where it is new. Rows move when another key comes in.
  int32_t* insert(uint64_t key) {
    size_t slot = slot_of(key);
    if (!words_[slot * stride()]) {
      if (2 * (used_ + 1) > mask_ + 1) {
        lay_out(2 * (mask_ + 1), width_);
        slot = slot_of(key);
      }
      int32_t* head = &words_[slot * stride()];
      head[0] = 1;
      head[1] = static_cast<int32_t>(key);
      head[2] = static_cast<int32_t>(key >> 32);
      ++used_;
    }
    return &words_[slot * stride() + kHead];
  }

  void erase(uint64_t key) {
    size_t hole = slot_of(key);
    if (!words_[hole * stride()]) return;
    // What was pushed on past the hole moves back, so that it is still found from its home.
    for (size_t slot = (hole + 1) & mask_; words_[slot * stride()]; slot = (slot + 1) & mask_) {
      const size_t first = home(key_of(&words_[slot * stride()]));
      if (((slot - first) & mask_) < ((slot - hole) & mask_)) continue;
      std::copy_n(&words_[slot * stride()], stride(), &words_[hole * stride()]);
      hole = slot;
    }
    std::fill_n(&words_[hole * stride()], stride(), 0);
    --used_;
  }

  // Make all rows so many words wide; new ones are zeros.
  void widen(size_t width) { lay_out(mask_ + 1, width); }

 private:
  static constexpr size_t kLeast = 256, kHead = 3;  // a row's first words: whether it is in use, and its key

  size_t stride() const { return kHead + width_; }

  size_t home(uint64_t key) const {
    key ^= key >> 32;
    key *= 0xd6e8feb86659fd93ULL;
    return static_cast<size_t>(key ^ (key >> 32)) & mask_;
  }

  static uint64_t key_of(const int32_t* head) {
    return static_cast<uint64_t>(static_cast<uint32_t>(head[2])) << 32 | static_cast<uint32_t>(head[1]);
  }

  // Where the key is, or the free slot where it belongs.
  size_t slot_of(uint64_t key) const {
    size_t slot = home(key);
    while (words_[slot * stride()] && key_of(&words_[slot * stride()]) != key) slot = (slot + 1) & mask_;
    return slot;
  }

  void lay_out(size_t slots, size_t width) {
    FlatTable wider(width);
    wider.words_.assign(slots * wider.stride(), 0);
    wider.mask_ = slots - 1;
    for (size_t slot = 0; slot <= mask_; ++slot) {
      const int32_t* head = &words_[slot * stride()];
      if (!head[0]) continue;
      std::copy_n(head + kHead, width_, wider.insert(key_of(head)));
    }
    *this = std::move(wider);
  }

  size_t width_, mask_ = 0, used_ = 0;
  std::vector<int32_t> words_;
};

}  // namespace shoestring
