#include "kv_storage.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shoestring {

std::shared_ptr<uint8_t> allocate(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes > 0 ? bytes : 1);
#if defined(__linux__)
  constexpr size_t kLargePage = size_t{2} << 20;
  if (size >= kLargePage) {
    // Aligned by hand, so that whole large pages lie inside.
    const size_t reserved = size + kLargePage;
    void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base) + kLargePage - 1) / kLargePage * kLargePage;
    madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    return std::shared_ptr<uint8_t>(reinterpret_cast<uint8_t*>(aligned),
                                    [base, reserved](uint8_t*) { munmap(base, reserved); });
  }
#endif
  constexpr size_t kAlignment = 64;
  uint8_t* base = static_cast<uint8_t*>(std::calloc(size + kAlignment, 1));
  if (base == nullptr) throw std::bad_alloc();
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base) + kAlignment - 1) / kAlignment * kAlignment;
  return std::shared_ptr<uint8_t>(reinterpret_cast<uint8_t*>(aligned), [base](uint8_t*) { std::free(base); });
}

HeadCache KvStorage::head(int layer, int head) const {
  uint8_t* keys = data_.get() + static_cast<int64_t>(layer * shape_.heads + head) * plane_bytes(capacity_);
  return {keys, keys + shape_.key_bytes(capacity_), shape_.bf16, shape_.D};
}

void KvStorage::reserve(int64_t slots, int64_t keep) {
  slots = round_up(slots, 16);
  if (slots <= capacity_) return;
  const KvStorage old = *this;
  data_ = allocate(planes() * plane_bytes(slots));
  capacity_ = slots;
  if (keep > 0) copy_prefix(old, keep);
}

void KvStorage::copy_prefix(const KvStorage& source, int64_t length) {
  const int64_t whole = round_up(length, 16);  // both capacities are multiples of sixteen
  for (int layer = 0; layer < shape_.layers; ++layer) {
    for (int h = 0; h < shape_.heads; ++h) {
      const HeadCache to = head(layer, h), from = source.head(layer, h);
      std::memcpy(to.keys, from.keys, static_cast<size_t>(shape_.key_bytes(whole)));
      std::memcpy(to.values, from.values, static_cast<size_t>(shape_.value_bytes(whole)));
    }
  }
}

void KvStorage::copy_slot(const HeadCache& source, int64_t from, const HeadCache& target, int64_t to) {
  const int64_t D = source.D, D16 = round_up(D, 16);
  // A key's elements (pairs of them in bfloat16) lie 64 bytes apart.
  const int64_t steps = source.bf16 ? D / 2 : D;
  const uint8_t* read = source.keys + from / 16 * steps * 64 + from % 16 * 4;
  uint8_t* write = target.keys + to / 16 * steps * 64 + to % 16 * 4;
  for (int64_t i = 0; i < steps; ++i) std::memcpy(write + 64 * i, read + 64 * i, 4);
  if (!source.bf16) {
    std::memcpy(target.values + to * D16 * 4, source.values + from * D16 * 4, static_cast<size_t>(D16) * 4);
    return;
  }
  read = source.values + from / 2 * D16 * 4 + from % 2 * 2;
  write = target.values + to / 2 * D16 * 4 + to % 2 * 2;
  for (int64_t i = 0; i < D16; ++i) std::memcpy(write + 4 * i, read + 4 * i, 2);
}

void KvStorage::gather(int64_t first, const std::vector<int64_t>& rows) {
  const int64_t count = static_cast<int64_t>(rows.size());
  // Paths down a tree ascend: no slot is then overwritten before it is read. Else slots are read from a copy.
  bool ascending = true;
  for (int64_t i = 0; i < count; ++i) ascending = ascending && rows[i] >= i && (i == 0 || rows[i] > rows[i - 1]);
  const KvStorage source = *this;
  if (!ascending) {
    data_ = allocate(bytes());
    copy_prefix(source, capacity_);
  }
  for (int layer = 0; layer < shape_.layers; ++layer) {
    for (int h = 0; h < shape_.heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        if (rows[i] != i) copy_slot(source.head(layer, h), first + rows[i], head(layer, h), first + i);
      }
    }
  }
}

void KvStorage::write(const HeadCache& cache, int64_t slot, const float* key, const float* value,
                      const VectorKernels& kernels) {
  const int64_t D = cache.D, D16 = round_up(D, 16);
  if (!cache.bf16) {
    uint8_t* keys = cache.keys + slot / 16 * D * 64 + slot % 16 * 4;
    for (int64_t d = 0; d < D; ++d) std::memcpy(keys + 64 * d, key + d, 4);
    std::memcpy(cache.values + slot * D16 * 4, value, static_cast<size_t>(D) * 4);
    return;
  }
  uint16_t rounded[kMostHeadDimension];
  kernels.round_bf16(key, D, rounded);
  uint8_t* keys = cache.keys + slot / 16 * D * 32 + slot % 16 * 4;
  for (int64_t d = 0; d < D; d += 2) std::memcpy(keys + 32 * d, rounded + d, 4);
  kernels.round_bf16(value, D, rounded);
  uint8_t* values = cache.values + slot / 2 * D16 * 4 + slot % 2 * 2;
  for (int64_t d = 0; d < D; ++d) std::memcpy(values + 4 * d, rounded + d, 2);
}

void KvStorage::clear_value(const HeadCache& cache, int64_t slot) {
  if (!cache.bf16) return;
  const int64_t D16 = round_up(cache.D, 16);
  uint8_t* values = cache.values + slot / 2 * D16 * 4 + slot % 2 * 2;
  for (int64_t d = 0; d < D16; ++d) std::memset(values + 4 * d, 0, 2);
}

}  // namespace shoestring
