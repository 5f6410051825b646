// Cached keys and values of one sequence, all layers and heads, in the tiles that attention reads (see HeadCache).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"

namespace shoestring {

struct KvShape {
  int layers;
  int heads;  // key-value heads
  int D;
  bool bf16;

  int64_t key_bytes(int64_t slots) const { return slots * D * (bf16 ? 2 : 4); }
  int64_t value_bytes(int64_t slots) const { return slots * round_up(D, 16) * (bf16 ? 2 : 4); }
};

class KvStorage {
 public:
  explicit KvStorage(const KvShape& shape) : shape_(shape) {}

  const KvShape& shape() const { return shape_; }
  int64_t capacity() const { return capacity_; }
  int64_t bytes() const { return static_cast<int64_t>(planes()) * plane_bytes(capacity_); }

  HeadCache head(int layer, int head) const;

  // Room for `slots` slots, of which the first `keep` are kept.
  void reserve(int64_t slots, int64_t keep);
  // Slots [0, length) become those of `source`; there must be room.
  void copy_prefix(const KvStorage& source, int64_t length);
  // Slot first + i becomes slot first + rows[i].
  void gather(int64_t first, const std::vector<int64_t>& rows);
  // One row's key and value, D floats each.
  static void write(const HeadCache& cache, int64_t slot, const float* key, const float* value,
                    const VectorKernels& kernels);
  // A slot that pairs with the last one in use must hold numbers.
  static void clear_value(const HeadCache& cache, int64_t slot);

 private:
  int planes() const { return shape_.layers * shape_.heads; }
  int64_t plane_bytes(int64_t slots) const { return shape_.key_bytes(slots) + shape_.value_bytes(slots); }
  static void copy_slot(const HeadCache& source, int64_t from, const HeadCache& target, int64_t to);

  KvShape shape_;
  int64_t capacity_ = 0;
  std::shared_ptr<uint8_t> data_;
};

// Zeroed memory on large pages where the system has them.
std::shared_ptr<uint8_t> allocate(int64_t bytes);

}  // namespace shoestring
