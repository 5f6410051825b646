// A step of a GPU as its kernels read it: rows, their ancestors, slots, outputs and moves in one buffer of int32.
// Its plain twin is HostLayout.fill in src/shoestring/engine/cuda/layout.py, which also says what the fields are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "drafted.hpp"

namespace shoestring {

// One slot's token tree, and where it stands.
struct LaidTree {
  std::vector<int32_t> tokens, parents;
  int32_t cached, table_row;
  std::vector<int32_t> embedded_rows, embedded_places;  // rows with embeddings of their own, and where these lie
  std::vector<int32_t> outputs;                         // the rows whose next token is chosen
};

// A draft below the last token. `places`: by its place in a chain, where the embedding of a look-ahead row lies.
LaidTree laid_tree(const Drafted& drafted, int32_t cached, int32_t table_row, const std::vector<int32_t>& places);

// What a slot's last commit kept: these rows of its tree, to lie behind the tokens cached before that step.
struct LaidMoves {
  int32_t table_row, cached;
  std::vector<int32_t> rows;
};

class StepLayout {
 public:
  static constexpr size_t kAncestorWords = 8, kMostTreeRows = 32 * kAncestorWords;

  // `offsets`: where each field begins, in the order of `Bucket.sections`; the buffer must outlive this.
  StepLayout(int32_t* buffer, size_t size, size_t slots, size_t rows, size_t moves, const std::vector<size_t>& offsets);
  // Lays the trees one behind another, greedily drawn; returns each one's first row.
  std::vector<int32_t> fill(const std::vector<LaidTree>& trees, const std::vector<LaidMoves>& moves);

 private:
  // In the order of `Bucket.sections`.
  enum Field {
    kToken, kEmbedded, kPosition, kSlot, kTreeRow, kAncestors, kTableRow, kCached, kFirstRow, kRowCount, kIsChain,
    kOutputRow, kKeyLow, kKeyHigh, kTemperature, kMoveTableRow, kMoveFirst, kMoveCount, kMoveSource, kFields
  };
  int32_t* of(Field field) const { return buffer_ + offsets_[field]; }
  void lay(const LaidTree& tree, size_t slot, size_t first);
  void lay_moves(const std::vector<LaidMoves>& moves);

  int32_t* buffer_;
  size_t slots_, rows_, moves_;
  std::vector<size_t> offsets_;
};

}  // namespace shoestring
