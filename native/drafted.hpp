// A draft's rows, as drafting plans them and a step is laid out from them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace shoestring {

// A step's rows below the last token's: nodes of the trie, then look-ahead rows (token -1, source `kSources` of drafting.hpp).
struct Drafted {
  int32_t last = -1;  // the token that they follow
  std::vector<int32_t> tokens, parents;
  std::vector<int> sources;
  std::vector<std::pair<int32_t, int32_t>> chains;  // node, look-ahead rows below it; in the rows' order
  double expected = 1;                              // tokens that the step gives, by the nodes' chances

  size_t size() const { return tokens.size(); }
  // The first of the look-ahead rows below a node (ROOT: -1), and how many they are.
  std::pair<int32_t, int32_t> chain(int32_t node) const;
  // The tokens of rows of the step, 0 the last token's.
  std::vector<int32_t> tokens_of(const std::vector<int32_t>& rows) const;
  // Whether each node has a token of such a vocabulary; look-ahead rows have none.
  bool fits(int32_t vocabulary) const;
};

// Rows of a step, 0 the last token's, that its next tokens lead along, and what each of these is followed by.
struct Walk {
  std::vector<int32_t> path, emitted;
};

// `next`: the token that follows each row, the last token's first. A negative one ends the walk.
Walk walk(const Drafted& drafted, const int32_t* next, size_t count);

}  // namespace shoestring
