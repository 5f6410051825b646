#include "drafted.hpp"

#include <algorithm>
#include <stdexcept>

namespace shoestring {

std::pair<int32_t, int32_t> Drafted::chain(int32_t node) const {
  auto row = static_cast<int32_t>(size());
  for (auto last = chains.rbegin(); last != chains.rend(); ++last) {
    row -= last->second;
    if (last->first == node) return {row, last->second};
  }
  return {row, 0};
}

std::vector<int32_t> Drafted::tokens_of(const std::vector<int32_t>& rows) const {
  std::vector<int32_t> found;
  for (const int32_t row : rows) found.push_back(row == 0 ? last : tokens.at(static_cast<size_t>(row) - 1));
  return found;
}

bool Drafted::fits(int32_t vocabulary) const {
  auto nodes = tokens.end();
  for (const auto& chain : chains) nodes -= chain.second;
  return std::all_of(tokens.begin(), nodes, [vocabulary](int32_t token) { return token >= 0 && token < vocabulary; });
}

Walk walk(const Drafted& drafted, const int32_t* next, size_t count) {
  if (count != drafted.size() + 1) throw std::invalid_argument("a next token is needed for each row");
  Walk walked{{0}, {next[0]}};
  // A child comes after its parent, and siblings are unique: one look at each row is enough.
  for (size_t node = 0; node < drafted.size() && walked.emitted.back() >= 0; ++node) {
    if (drafted.parents[node] + 1 != walked.path.back() || drafted.tokens[node] != walked.emitted.back()) continue;
    walked.path.push_back(static_cast<int32_t>(node) + 1);
    walked.emitted.push_back(next[node + 1]);
  }
  return walked;
}

}  // namespace shoestring
