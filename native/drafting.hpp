// The merged drafter's hot part: suffix index, successor tables, acceptance rates, and the trie grown best-first.
// Its plain twin is src/shoestring/decoding/drafters/guesses.py: both give the same drafts.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <utility>
#include <vector>

#include "drafted.hpp"
#include "flat_table.hpp"

namespace shoestring {

// kOnlyPass: what PaSS alone foresaw.
constexpr int kNgram = 0, kRecycle = 1, kPass = 2, kOnlyPass = 3, kDatastore = 4, kSources = 5;
constexpr int kMostLength = 32, kMostRank = 32, kMostTail = 16;

// A kind of guess: source, length of the context that it matched (PaSS: position), rank among that source's guesses.
struct Guess {
  int source, length, rank;
};

// How often each kind of guess came true, with a prior and slow forgetting.
class AcceptanceRates {
 public:
  // `first[source][length]`: the prior of rank 0, the last one for all greater lengths too.
  AcceptanceRates(std::vector<std::vector<double>> first, double prior_weight, double memory);
  void set_prior(Guess guess, double rate);
  double rate(Guess guess) const { return rates_[at(guess)]; }
  double rate(size_t cell) const { return rates_[cell]; }
  void observe(Guess guess, bool hit) { observe(at(guess), hit); }
  void observe(size_t cell, bool hit);
  // Where a kind's count lies.
  static size_t at(Guess guess) {
    const bool known = guess.source >= 0 && guess.source < kSources && guess.length >= 0 && guess.length < kMostLength &&
                       guess.rank >= 0 && guess.rank < kMostRank;
    if (!known) throw std::out_of_range("no such kind of guess");
    return (static_cast<size_t>(guess.source) * kMostLength + guess.length) * kMostRank + guess.rank;
  }

 private:
  struct Cell {
    double prior, hits, trials;
  };
  void weigh(size_t at);

  double prior_weight_, memory_;
  std::vector<Cell> cells_;    // [source, length, rank]
  std::vector<double> rates_;  // likewise: what is read at every node lies close together
};

// How much likelier than its best guess says a token is where other sources guess it too, and how much less likely where
// none does: counted over one text.
class Agreement {
 public:
  Agreement() { forget(); }
  void forget();
  // `others`: how many other sources guess the token.
  double factor(int source, int others) const { return factors_[at(source, others)]; }
  void observe(int source, int others, double chance, bool hit);

 private:
  static constexpr int kMostOthers = 2;
  static constexpr double kPrior = 5, kMemory = 300;
  static size_t at(int source, int others) {
    return static_cast<size_t>(source * (kMostOthers + 1) + std::min(others, kMostOthers));
  }
  std::array<double, kSources*(kMostOthers + 1)> hits_, expected_, factors_;
};

// A few tokens, which are looked for in many: all are compared at once, since where a search ends can't be foreseen.
template <size_t kMost>
class FewTokens {
 public:
  int count() const { return count_; }
  int32_t operator[](int i) const { return tokens_[i]; }
  void clear() { count_ = 0; }

  void push(int32_t token) {
    if (count_ == kMost) throw std::length_error("more guesses at a token than there is room for");
    if (count_ % kAtOnce == 0) std::fill_n(tokens_.begin() + count_, kAtOnce, kNone);
    tokens_[count_++] = token;
  }

  // Where it is, -1 where it is not; looked for among the first `among`, or a few more.
  int find(int32_t token, int among) const {
    for (int first = 0; first < among; first += kAtOnce) {
      int any = 0;
      for (int i = 0; i < kAtOnce; ++i) any |= tokens_[first + i] == token;
      if (!any) continue;
      while (tokens_[first] != token) ++first;
      return first;
    }
    return -1;
  }
  int find(int32_t token) const { return find(token, count_); }

 private:
  static constexpr int kAtOnce = 8;
  static constexpr int32_t kNone = -2;  // nobody looks for it
  static_assert(kMost % kAtOnce == 0);
  std::array<int32_t, kMost> tokens_;
  int count_ = 0;
};

// The nodes of a trie in the order in which they were taken: by falling chance, parents first.
struct Grown {
  std::vector<int32_t> tokens, parents;
  std::vector<int> sources;
  std::vector<double> chances;
};

using Predictions = std::vector<std::vector<int32_t>>;

// Tokens likely behind the sequence (row 0) and behind each row of a draft, [rows, width], best first.
struct Successors {
  const int32_t* values = nullptr;
  size_t rows = 0, width = 0;
};

// Seconds of a step with 0, 1, ... rows beside the last token's; empty: rows cost nothing.
struct Seconds {
  const double* of = nullptr;
  size_t count = 0;
};

// The keys of a text's last 1, 2, ... tokens, at their lengths; 0: that of none.
class GramKeys {
 public:
  GramKeys(const int32_t* tail, int length);
  uint64_t operator[](int length) const { return keys_[length]; }

 private:
  std::array<uint64_t, kMostTail + 1> keys_;
};

// Texts that the model wrote before, which many sequences share: what followed the longest suffix there. Positions lie
// sorted by the tokens before them, the nearest first, so that those behind an n-gram are one range.
class Datastore {
 public:
  static constexpr int kLeastLength = 2, kMostTokens = 8;
  struct Match {
    int length = 0, count = 0;
    std::array<int32_t, kMostTokens> tokens;  // the most frequent first, of those that lie evenly in the range
  };
  Datastore(const int32_t* tokens, size_t count, int longest);
  // Ask for what follows a suffix ahead of time, by its keys.
  void prefetch(const GramKeys& keys, int length) const {
    for (int least = kLeastLength; least <= std::min(length, kPrefetched); ++least) ranges_.prefetch(keys[least]);
  }
  Match find(const int32_t* tail, int length, const GramKeys& keys) const;

 private:
  // Ranges of so few places are searched through, others have those of the next longer n-grams in the table.
  static constexpr int64_t kFew = 64;
  static constexpr int kPrefetched = 4;

  // Of the place's token and those before its pair, the one that stands so far before the token (0: the token itself).
  int32_t at(size_t place, int back) const { return places_[place * width_ + (back ? back - kLeastLength : 0)]; }
  void keep(uint64_t key, size_t first, size_t last, int length);

  int longest_;
  size_t width_;
  // All places of the texts in the order of what stands before them, nearest tokens first; a place's token and the tokens
  // before its pair lie together, since each look at another place waits for memory.
  std::vector<int32_t> places_;
  FlatTable ranges_{2};  // by n-gram: its range of places
};

class Guesses {
 public:
  Guesses(AcceptanceRates& rates, int longest, size_t pairs);
  // Successors of each token known beforehand, [tokens, width], which the caller keeps alive.
  void set_known(const int32_t* successors, size_t tokens, size_t width);
  // The caller keeps it alive.
  void set_datastore(const Datastore* datastore) { datastore_ = datastore; }
  void forget();
  void extend(const int32_t* tokens, size_t count);
  size_t length() const { return tokens_.size(); }
  // At most `most` nodes; the first one below `least` is the last one. Where rows cost something, growth stops when no
  // number of further nodes can give more tokens per second than the best one so far.
  Grown grow(size_t most, double least, const Predictions& predictions, Seconds seconds) const;
  // The first nodes of such a trie that give the most tokens per second, and among them at most `ahead` look-ahead rows
  // below a node, each worth more than `least_value` (`plan_rows`).
  Drafted draft(size_t most, double least, const Predictions& predictions, Seconds seconds, size_t ahead,
                double least_value) const;
  // Counts which guesses at the tokens emitted behind the sequence came true; then remembers what the model found likely
  // after the sequence and after each row of a draft, `successors`, the sequence's first.
  void observe(const std::vector<int32_t>& emitted, const Predictions& predictions, const std::vector<int32_t>& tokens,
               const std::vector<int32_t>& parents, const std::vector<int32_t>& accepted, Successors successors);

 private:
  static constexpr int kMostEnds = 8;
  // Rows of `ends_`: how many times the n-gram ended, and the last positions behind it, the newest at [(n - 1) % kMostEnds].
  // Rows of successors: when they were updated, their number, and these.
  static constexpr size_t kUsualSuccessors = 8, kSuccessorsHead = 2;
  static constexpr size_t kMostFound = 8 * kMostRank;
  // Guesses at a token, several of which may be the same one.
  struct Found {
    FewTokens<kMostFound> tokens;
    std::array<uint16_t, kMostFound> kinds;  // where their rates lie
    std::array<uint8_t, kMostFound> sources;
    void push(int32_t token, Guess guess) {
      tokens.push(token);
      kinds[tokens.count() - 1] = static_cast<uint16_t>(AcceptanceRates::at(guess));
      sources[tokens.count() - 1] = static_cast<uint8_t>(guess.source);
    }
  };
  // The tokens guessed, each once, with the chance of its most promising guess.
  struct Candidates {
    FewTokens<kMostFound> tokens;
    std::array<double, kMostFound> chances;
    std::array<uint8_t, kMostFound> sources, others;  // that of the guess, and how many more guess the token
    std::array<uint8_t, kMostFound> every;            // a bit for each of them
  };
  struct Tail {
    std::array<int32_t, kMostTail> tokens;
    int length;
    void push(int32_t token, int longest);
  };

  Tail tail() const;
  void find(const Tail& tail, size_t depth, const Predictions& predictions, Found& found) const;
  // `agreement`: what to correct chances by; null: nothing.
  void weigh(const Found& found, Candidates& candidates, const Agreement* agreement) const;
  void judge(const std::vector<int32_t>& emitted, const Predictions& predictions);
  void remember(int32_t before, int32_t token, const int32_t* successors, size_t count);
  static int32_t* store(FlatTable& table, uint64_t key, const int32_t* successors, size_t count);

  AcceptanceRates& rates_;
  Agreement agreement_;
  int longest_;
  size_t pairs_;
  std::vector<int32_t> tokens_;
  FlatTable ends_{1 + kMostEnds};
  FlatTable after_pair_{kSuccessorsHead + kUsualSuccessors}, after_{kSuccessorsHead + kUsualSuccessors};
  std::deque<std::pair<uint64_t, int32_t>> updates_;  // (pair, when), the oldest first
  int32_t clock_ = 0;
  const int32_t* known_ = nullptr;
  size_t known_tokens_ = 0, known_width_ = 0;
  const Datastore* datastore_ = nullptr;
};

// How many of a trie's nodes to keep, and how many look-ahead rows to put below a row (ROOT, -1, and nodes).
struct Plan {
  size_t kept = 0;
  std::vector<std::pair<int32_t, int32_t>> chains;  // node, rows below it; by node
};

// The rows with the most expected tokens per second. `gains[j]`: the chance that the j-th look-ahead row below the token
// where the path ends foresees one that nothing else does, falling; rows worth `least` or less are left out. Where rows cost
// nothing, they are the `most` best ones.
Plan plan_rows(const std::vector<int32_t>& parents, const std::vector<double>& chances, const std::vector<double>& gains,
               double least, size_t most, Seconds seconds);

}  // namespace shoestring
