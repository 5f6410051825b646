#include "step_layout.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace shoestring {

LaidTree laid_tree(const Drafted& drafted, int32_t cached, int32_t table_row, const std::vector<int32_t>& places) {
  const size_t rows = drafted.size() + 1;
  LaidTree tree{{}, {}, cached, table_row, {}, {}, {}};
  for (auto* ints : {&tree.tokens, &tree.parents, &tree.outputs}) ints->reserve(rows);
  tree.tokens.push_back(drafted.last);
  tree.parents.push_back(-1);
  tree.tokens.insert(tree.tokens.end(), drafted.tokens.begin(), drafted.tokens.end());
  for (const int32_t parent : drafted.parents) tree.parents.push_back(parent + 1);
  for (size_t row = 0; row < rows; ++row) tree.outputs.push_back(static_cast<int32_t>(row));
  size_t ahead = 0;
  for (const auto& chain : drafted.chains) ahead += chain.second;
  auto row = static_cast<int32_t>(rows - ahead);
  for (const auto& chain : drafted.chains) {
    for (int32_t place = 0; place < chain.second; ++place) {
      tree.embedded_rows.push_back(row++);
      tree.embedded_places.push_back(places.at(place));
    }
  }
  return tree;
}

StepLayout::StepLayout(int32_t* buffer, size_t size, size_t slots, size_t rows, size_t moves,
                       const std::vector<size_t>& offsets)
    : buffer_(buffer), slots_(slots), rows_(rows), moves_(moves), offsets_(offsets) {
  if (offsets.size() != kFields) throw std::invalid_argument("a layout has another number of fields");
  for (size_t field = 0; field < kFields; ++field) {
    const size_t count = field == kAncestors      ? rows * kAncestorWords
                         : field == kMoveSource   ? slots * moves
                         : field < kTableRow      ? rows
                         : field < kOutputRow     ? slots
                         : field < kMoveTableRow  ? rows
                                                  : slots;
    if (offsets[field] > size || count > size - offsets[field]) throw std::invalid_argument("a field ends beyond its layout");
  }
}

std::vector<int32_t> StepLayout::fill(const std::vector<LaidTree>& trees, const std::vector<LaidMoves>& moves) {
  size_t rows = 0, outputs = 0;
  for (const LaidTree& tree : trees) rows += tree.tokens.size(), outputs += tree.outputs.size();
  if (trees.size() > slots_ || moves.size() > slots_ || rows > rows_ || outputs > rows_) {
    throw std::invalid_argument("the step is larger than its bucket");
  }
  std::vector<int32_t> firsts;
  size_t first = 0, output = 0;
  for (const LaidTree& tree : trees) {
    lay(tree, firsts.size(), first);
    firsts.push_back(static_cast<int32_t>(first));
    for (const int32_t row : tree.outputs) {
      if (row < 0 || static_cast<size_t>(row) >= tree.tokens.size()) throw std::invalid_argument("an output is no row");
      of(kOutputRow)[output++] = static_cast<int32_t>(first) + row;
    }
    first += tree.tokens.size();
  }
  for (const Field field : {kToken, kEmbedded, kPosition, kTreeRow}) std::fill(of(field) + rows, of(field) + rows_, 0);
  std::fill(of(kSlot) + rows, of(kSlot) + rows_, -1);
  std::fill(of(kOutputRow) + outputs, of(kOutputRow) + rows_, -1);
  std::fill(of(kTemperature), of(kTemperature) + rows_, 0);  // 0.0, too
  std::fill(of(kTableRow) + trees.size(), of(kTableRow) + slots_, -1);
  std::fill(of(kRowCount) + trees.size(), of(kRowCount) + slots_, 0);
  lay_moves(moves);
  return firsts;
}

void StepLayout::lay(const LaidTree& tree, size_t slot, size_t first) {
  const size_t count = tree.tokens.size();
  if (tree.parents.size() != count || tree.embedded_places.size() != tree.embedded_rows.size()) {
    throw std::invalid_argument("a tree needs a parent for each row, and a place for each embedding");
  }
  bool chain = true;
  int32_t* const position = of(kPosition) + first;
  for (size_t row = 0; row < count; ++row) {
    const int32_t parent = tree.parents[row];
    if (parent < -1 || parent >= static_cast<int32_t>(row)) throw std::invalid_argument("a parent comes before its row");
    chain &= parent == static_cast<int32_t>(row) - 1;
    position[row] = parent < 0 ? tree.cached : position[parent] + 1;
    of(kToken)[first + row] = std::max(tree.tokens[row], 0);
    of(kEmbedded)[first + row] = 0;
    of(kSlot)[first + row] = static_cast<int32_t>(slot);
    of(kTreeRow)[first + row] = static_cast<int32_t>(row);
  }
  if (!chain) {
    if (count > kMostTreeRows) throw std::invalid_argument("a branching tree has too many rows");
    auto* const bits = reinterpret_cast<uint32_t*>(of(kAncestors)) + first * kAncestorWords;
    for (size_t row = 0; row < count; ++row) {
      uint32_t* const own = bits + row * kAncestorWords;
      if (tree.parents[row] < 0) std::memset(own, 0, kAncestorWords * sizeof *own);
      else std::memcpy(own, bits + tree.parents[row] * kAncestorWords, kAncestorWords * sizeof *own);
      own[row / 32] |= uint32_t{1} << row % 32;
    }
  }
  for (size_t i = 0; i < tree.embedded_rows.size(); ++i) {
    const int32_t row = tree.embedded_rows[i];
    if (row < 0 || static_cast<size_t>(row) >= count) throw std::invalid_argument("an embedding is no row's");
    of(kEmbedded)[first + row] = tree.embedded_places[i] + 1;
  }
  of(kTableRow)[slot] = tree.table_row;
  of(kCached)[slot] = tree.cached;
  of(kFirstRow)[slot] = static_cast<int32_t>(first);
  of(kRowCount)[slot] = static_cast<int32_t>(count);
  of(kIsChain)[slot] = chain;
}

void StepLayout::lay_moves(const std::vector<LaidMoves>& moves) {
  size_t slot = 0;
  for (const LaidMoves& move : moves) {
    size_t kept = 0;
    while (kept < move.rows.size() && move.rows[kept] == static_cast<int32_t>(kept)) ++kept;  // it lies where it belongs
    const size_t count = move.rows.size() - kept;
    if (count == 0) continue;
    if (count > moves_) throw std::invalid_argument("more rows are moved than the bucket has");
    of(kMoveTableRow)[slot] = move.table_row;
    of(kMoveFirst)[slot] = move.cached + static_cast<int32_t>(kept);
    of(kMoveCount)[slot] = static_cast<int32_t>(count);
    int32_t* const source = of(kMoveSource) + slot * moves_;
    for (size_t i = 0; i < count; ++i) source[i] = move.rows[kept + i] + move.cached;
    ++slot;
  }
  std::fill(of(kMoveCount) + slot, of(kMoveCount) + slots_, 0);
}

}  // namespace shoestring
