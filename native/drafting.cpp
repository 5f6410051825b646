#include "drafting.hpp"

#include <algorithm>
#include <functional>
#include <queue>
#include <stdexcept>
#include <utility>

namespace shoestring {
namespace {

constexpr size_t kManyOffers = 512, kUsualNodes = 64;
constexpr double kTaught = 0.01;  // tokens that a row is worth beside its chance (tune.TAUGHT)
constexpr double kMostCertain = 0.97;  // a chance that sources which agree make it
constexpr int32_t kBelow = -2;  // in place of a token
constexpr double kSlack = 1 + 1e-9;  // sums round: nothing that may be as good as the best is given up

// The key of an n-gram from that of its last n - 1 tokens, and the token before these.
uint64_t gram_key(uint64_t shorter, int32_t token) {
  const uint64_t key = (shorter ^ static_cast<uint32_t>(token)) * 0x9e3779b97f4a7c15ULL;
  return key ^ (key >> 29);
}
constexpr uint64_t kNoGram = 0xcbf29ce484222325ULL;

uint64_t pair_key(int32_t before, int32_t token) {
  return static_cast<uint64_t>(static_cast<uint32_t>(before)) << 32 | static_cast<uint32_t>(token);
}

// A token that may stand below a node; or, as long as nobody has looked, whatever may stand there (kBelow), with a chance
// that none of it exceeds.
struct Offer {
  double chance;
  size_t order;
  int32_t parent, token;
  int source;
  // The heap's top is the likeliest offer, of equals the earliest.
  bool operator<(const Offer& other) const {
    return chance != other.chance ? chance < other.chance : order > other.order;
  }
};

// Expected tokens of the rows taken so far, by falling chance, and the most of them per second.
class Speed {
 public:
  Speed(size_t most, Seconds seconds)
      : seconds_(seconds.of), last_(std::min(most + 1, seconds.count)), fastest_(last_ ? 1 / seconds_[0] : 0) {}

  // Whether some number of further rows, each with at most this chance, may give more.
  bool may_gain(double chance) const {
    if (!seconds_) return true;
    for (size_t row = rows_ + 1; row < last_; ++row) {
      if ((expected_ + static_cast<double>(row - rows_) * (chance + kTaught)) * kSlack > fastest_ * seconds_[row]) return true;
    }
    return false;
  }

  void take(double chance) {
    expected_ += chance + kTaught;
    if (++rows_ >= last_) return;
    const double speed = expected_ / seconds_[rows_];
    if (speed > fastest_) best_ = rows_, fastest_ = speed;
  }

  // How many of the rows to keep: of equal speeds the fewest, where rows cost nothing all.
  size_t best() const { return seconds_ ? best_ : rows_; }

 private:
  const double* seconds_;
  size_t last_, rows_ = 0, best_ = 0;
  double expected_ = 1.0, fastest_;
};

}  // namespace

AcceptanceRates::AcceptanceRates(std::vector<std::vector<double>> first, double prior_weight, double memory)
    : prior_weight_(prior_weight), memory_(memory), cells_(kSources * kMostLength * kMostRank), rates_(cells_.size()) {
  if (first.size() != kSources) throw std::invalid_argument("priors of all sources are needed");
  for (int source = 0; source < kSources; ++source) {
    const std::vector<double>& priors = first[source];
    if (priors.empty()) throw std::invalid_argument("a source has no prior");
    for (int length = 0; length < kMostLength; ++length) {
      const double prior = priors[std::min(static_cast<size_t>(length), priors.size() - 1)];
      for (int rank = 0; rank < kMostRank; ++rank) set_prior({source, length, rank}, prior * (rank ? 0.4 / rank : 1.0));
    }
  }
}

void AcceptanceRates::set_prior(Guess guess, double rate) {
  cells_[at(guess)].prior = rate;
  weigh(at(guess));
}

void AcceptanceRates::observe(size_t at, bool hit) {
  Cell& cell = cells_[at];
  if (cell.trials >= memory_) {
    const double keep = 1 - 1 / memory_;
    cell.hits *= keep;
    cell.trials *= keep;
  }
  cell.hits += hit ? 1 : 0;
  cell.trials += 1;
  weigh(at);
}

void AcceptanceRates::weigh(size_t at) {
  const Cell& cell = cells_[at];
  rates_[at] = (cell.hits + prior_weight_ * cell.prior) / (cell.trials + prior_weight_);
}

void Agreement::forget() {
  hits_.fill(kPrior);
  expected_.fill(kPrior);
  factors_.fill(1);
}

void Agreement::observe(int source, int others, double chance, bool hit) {
  const size_t cell = at(source, others);
  if (expected_[cell] >= kMemory) {
    hits_[cell] *= 0.5;
    expected_[cell] *= 0.5;
  }
  hits_[cell] += hit ? 1 : 0;
  expected_[cell] += chance;
  factors_[cell] = hits_[cell] / expected_[cell];
}

GramKeys::GramKeys(const int32_t* tail, int length) {
  keys_[0] = kNoGram;
  for (int least = 1; least <= length; ++least) keys_[least] = gram_key(keys_[least - 1], tail[length - least]);
}

Datastore::Datastore(const int32_t* tokens, size_t count, int longest)
    : longest_(longest), width_(static_cast<size_t>(longest) - kLeastLength + 1) {
  if (longest < kLeastLength || longest > kMostTail) throw std::invalid_argument("suffixes of 2 to 16 tokens can be looked for");
  const auto before = [tokens](int32_t position, int back) { return position >= back ? tokens[position - back] : -1; };
  struct Place {
    uint64_t nearest;  // three tokens' lowest 21 bits, which most often decide, without a look at the texts
    int32_t position;
  };
  constexpr int kNearest = 3, kBits = 21;
  std::vector<Place> order;
  if (count > kLeastLength) order.reserve(count - kLeastLength);
  for (size_t i = kLeastLength; i < count; ++i) {
    const auto position = static_cast<int32_t>(i);
    uint64_t nearest = 0;
    for (int back = 1; back <= kNearest; ++back) {
      const int32_t token = back <= longest ? before(position, back) + 1 : 0;
      if (token < 0 || token >> kBits) throw std::invalid_argument("a token is negative, or beyond two million");
      nearest = nearest << kBits | static_cast<uint64_t>(token);
    }
    order.push_back({nearest, position});
  }
  std::sort(order.begin(), order.end(), [&](const Place& one, const Place& other) {
    if (one.nearest != other.nearest) return one.nearest < other.nearest;
    for (int back = kNearest + 1; back <= longest; ++back) {
      const int32_t left = before(one.position, back), right = before(other.position, back);
      if (left != right) return left < right;
    }
    return one.position < other.position;
  });
  places_.reserve(order.size() * width_);
  for (const Place& place : order) {
    places_.push_back(tokens[place.position]);
    for (int back = kLeastLength + 1; back <= longest; ++back) places_.push_back(before(place.position, back));
  }
  const auto pair_key_at = [&](size_t i) {
    return gram_key(gram_key(kNoGram, before(order[i].position, 1)), before(order[i].position, 2));
  };
  for (size_t first = 0, last; first < order.size(); first = last) {
    const uint64_t pair = pair_key_at(first);
    for (last = first + 1; last < order.size() && pair_key_at(last) == pair;) ++last;
    keep(pair, first, last, kLeastLength);
  }
}

void Datastore::keep(uint64_t key, size_t first, size_t last, int length) {
  int32_t* range = ranges_.insert(key);
  range[0] = static_cast<int32_t>(first);
  range[1] = static_cast<int32_t>(last);
  if (length == longest_ || static_cast<int64_t>(last - first) <= kFew) return;
  for (size_t from = first, to; from < last; from = to) {
    const int32_t token = at(from, length + 1);
    for (to = from + 1; to < last && at(to, length + 1) == token;) ++to;
    if (token >= 0) keep(gram_key(key, token), from, to, length + 1);
  }
}

Datastore::Match Datastore::find(const int32_t* tail, int length, const GramKeys& keys) const {
  Match match;
  if (length < kLeastLength) return match;
  const int32_t* range = ranges_.find(keys[kLeastLength]);
  if (!range) return match;
  int64_t first = range[0], last = range[1];
  const int most = std::min(longest_, length);
  for (match.length = kLeastLength; match.length < most && last - first > kFew; ++match.length) {
    range = ranges_.find(keys[match.length + 1]);
    if (!range) break;
    first = range[0], last = range[1];
  }
  for (; match.length < most && last - first <= kFew; ++match.length) {
    const int back = match.length + 1;
    const int32_t token = tail[length - back];
    int64_t low = first, high;
    while (low < last && at(low, back) != token) ++low;
    if (low == last) break;
    for (high = low + 1; high < last && at(high, back) == token;) ++high;
    first = low, last = high;
  }
  const int64_t found = last - first, looked_at = std::min<int64_t>(found, kMostTokens);
  std::array<int, kMostTokens> times{};
  for (int64_t i = 0; i < looked_at; ++i) {
    const int32_t token = at(first + i * found / looked_at, 0);
    const auto end = match.tokens.begin() + match.count;
    const auto rank = std::find(match.tokens.begin(), end, token) - match.tokens.begin();
    if (rank == match.count) match.tokens[match.count++] = token;
    ++times[rank];
  }
  for (int i = 1; i < match.count; ++i) {  // stable, and of a few
    for (int j = i; j > 0 && times[j] > times[j - 1]; --j) {
      std::swap(times[j], times[j - 1]);
      std::swap(match.tokens[j], match.tokens[j - 1]);
    }
  }
  return match;
}

void Guesses::Tail::push(int32_t token, int longest) {
  if (length == longest) {
    std::copy(tokens.begin() + 1, tokens.begin() + length, tokens.begin());
    --length;
  }
  tokens[length++] = token;
}

Guesses::Guesses(AcceptanceRates& rates, int longest, size_t pairs)
    : rates_(rates), longest_(longest), pairs_(pairs) {
  if (longest < 2 || longest > kMostTail) throw std::invalid_argument("suffixes of 2 to 16 tokens can be looked for");
}

void Guesses::set_known(const int32_t* successors, size_t tokens, size_t width) {
  known_ = successors;
  known_tokens_ = tokens;
  known_width_ = std::min<size_t>(width, kMostRank);
}

void Guesses::forget() {
  tokens_.clear();
  ends_.clear();
  after_pair_.clear();
  after_.clear();
  updates_.clear();
  clock_ = 0;
  agreement_.forget();
}

void Guesses::extend(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    // What ended before this token is followed by it.
    const int end = static_cast<int>(tokens_.size());
    uint64_t key = kNoGram;
    for (int length = 1; length <= std::min(longest_, end); ++length) {
      key = gram_key(key, tokens_[end - length]);
      int32_t* ends = ends_.insert(key);
      ends[1 + ends[0]++ % kMostEnds] = end;
    }
    tokens_.push_back(tokens[i]);
  }
}

Guesses::Tail Guesses::tail() const {
  Tail tail{};
  tail.length = static_cast<int>(std::min<size_t>(longest_, tokens_.size()));
  std::copy(tokens_.end() - tail.length, tokens_.end(), tail.tokens.begin());
  return tail;
}

void Guesses::find(const Tail& tail, size_t depth, const Predictions& predictions, Found& found) const {
  found.tokens.clear();
  const int32_t last = tail.tokens[tail.length - 1];
  const uint64_t pair = tail.length > 1 ? pair_key(tail.tokens[tail.length - 2], last) : 0;
  const bool is_known = last >= 0 && static_cast<size_t>(last) < known_tokens_;
  // All that is looked up below lies far apart: it is fetched at once, before any of it is waited for.
  const GramKeys keys(tail.tokens.data(), tail.length);
  for (int length = 1; length <= tail.length; ++length) ends_.prefetch(keys[length]);
  after_pair_.prefetch(pair);
  after_.prefetch(static_cast<uint32_t>(last));
  if (datastore_) datastore_->prefetch(keys, tail.length);
  if (is_known) prefetch(known_ + last * known_width_);
  // Where an n-gram ended, shorter ones did too.
  std::array<const int32_t*, kMostTail + 1> ends;
  int longest = 0;
  while (longest < tail.length && (ends[longest + 1] = ends_.find(keys[longest + 1]))) ++longest;
  for (int length = longest; length > 0 && found.tokens.count() == 0; --length) {
    const int32_t* gram = tail.tokens.data() + tail.length - length;
    const int32_t added = *ends[length];
    for (int32_t i = added - 1; i >= std::max(0, added - kMostEnds); --i) {
      const int32_t end = ends[length][1 + i % kMostEnds];
      // Keys are hashes: the text itself says whether it matches.
      if (!std::equal(gram, gram + length, tokens_.begin() + end - length)) continue;
      if (found.tokens.find(tokens_[end]) < 0) found.push(tokens_[end], {kNgram, length, found.tokens.count()});
    }
  }
  FewTokens<4 * kMostRank> recycled;
  int deepest = 0;  // the lists found so far: what a longer context gave goes first, and makes the others less likely
  const auto recycle = [&](const int32_t* tokens, size_t count, int length) {
    const int kind = deepest ? length + 3 : length;
    for (size_t rank = 0; rank < std::min<size_t>(count, kMostRank); ++rank) {
      if (recycled.find(tokens[rank]) >= 0) continue;
      recycled.push(tokens[rank]);
      found.push(tokens[rank], {kRecycle, kind, static_cast<int>(rank)});
    }
    deepest += count > 0;
  };
  const auto recycle_row = [&recycle](const int32_t* row, int length) {
    if (row) recycle(row + kSuccessorsHead, static_cast<size_t>(row[1]), length);
  };
  if (tail.length > 1) recycle_row(after_pair_.find(pair), 2);
  recycle_row(after_.find(static_cast<uint32_t>(last)), 1);
  if (is_known) recycle(known_ + last * known_width_, known_width_, 0);
  if (depth < predictions.size()) {
    int rank = 0;
    for (const int32_t token : predictions[depth]) found.push(token, {kPass, static_cast<int>(depth) + 1, rank++});
  }
  if (datastore_) {
    const Datastore::Match match = datastore_->find(tail.tokens.data(), tail.length, keys);
    for (int rank = 0; rank < match.count; ++rank) found.push(match.tokens[rank], {kDatastore, match.length, rank});
  }
}

void Guesses::weigh(const Found& found, Candidates& candidates, const Agreement* agreement) const {
  candidates.tokens.clear();
  int grams = 0;
  for (int i = 0; i < found.tokens.count(); ++i) {
    const double rate = rates_.rate(found.kinds[i]);
    // Those of one source differ, and recycled ones come behind n-grams alone.
    const int source = found.sources[i], known = candidates.tokens.count();
    if (source == kNgram) grams = known + 1;
    int same = source == kNgram ? -1 : candidates.tokens.find(found.tokens[i], source == kRecycle ? grams : known);
    const auto own = static_cast<uint8_t>(1 << source);
    if (same < 0) {
      same = candidates.tokens.count();
      candidates.tokens.push(found.tokens[i]);
      candidates.every[same] = own;
      candidates.others[same] = 0;
    } else {
      candidates.others[same] += !(candidates.every[same] & own);
      candidates.every[same] |= own;
      if (rate <= candidates.chances[same]) continue;
    }
    candidates.chances[same] = rate;
    candidates.sources[same] = found.sources[i];
  }
  if (agreement) {
    for (int i = 0; i < candidates.tokens.count(); ++i) {
      const double factor = agreement->factor(candidates.sources[i], candidates.others[i]);
      candidates.chances[i] = std::min(kMostCertain, candidates.chances[i] * factor);
    }
  }
  // Only one of them can be right: rates that add up to more than certainty contradict each other.
  double sum = 0;
  for (int i = 0; i < candidates.tokens.count(); ++i) sum += candidates.chances[i];
  if (sum <= 1) return;
  for (int i = 0; i < candidates.tokens.count(); ++i) candidates.chances[i] /= sum;
}

Grown Guesses::grow(size_t most, double least, const Predictions& predictions, Seconds seconds) const {
  Grown grown;
  if (tokens_.empty() || most == 0) return grown;
  std::vector<Offer> offers;
  offers.reserve(kManyOffers);
  std::priority_queue<Offer> heap(std::less<Offer>(), std::move(offers));
  std::vector<Tail> tails;  // of each node
  for (auto* ints : {&grown.tokens, &grown.parents, &grown.sources}) ints->reserve(kUsualNodes);
  grown.chances.reserve(kUsualNodes), tails.reserve(kUsualNodes);
  std::vector<size_t> depths;
  Found found;
  Candidates candidates;
  size_t order = 0;
  double unlikely = -1;
  const auto look_below = [&](int32_t node, double chance, const Tail& tail, size_t depth) {
    find(tail, depth, predictions, found);
    weigh(found, candidates, &agreement_);
    for (int i = 0; i < candidates.tokens.count(); ++i) {
      const Offer next{chance * candidates.chances[i], order++, node, candidates.tokens[i], candidates.sources[i]};
      if (next.chance < least) {  // only the likeliest of these can be taken: it is the last one
        if (next.chance <= unlikely) continue;
        unlikely = next.chance;
      }
      heap.push(next);
    }
  };
  const Tail root = tail();
  Speed speed(most, seconds);
  look_below(-1, 1.0, root, 0);
  while (!heap.empty() && grown.tokens.size() < most && speed.may_gain(heap.top().chance)) {
    const Offer next = heap.top();
    heap.pop();
    if (next.token == kBelow) {
      look_below(next.parent, grown.chances[next.parent], tails[next.parent], depths[next.parent]);
      continue;
    }
    speed.take(next.chance);
    const auto node = static_cast<int32_t>(grown.tokens.size());
    Tail below = next.parent < 0 ? root : tails[next.parent];
    below.push(next.token, longest_);
    grown.tokens.push_back(next.token);
    grown.parents.push_back(next.parent);
    grown.sources.push_back(next.source);
    grown.chances.push_back(next.chance);
    tails.push_back(below);
    depths.push_back(next.parent < 0 ? 1 : depths[next.parent] + 1);
    if (next.chance < least) break;
    heap.push({next.chance * kMostCertain, order++, node, kBelow, 0});
  }
  return grown;
}

Plan plan_rows(const std::vector<int32_t>& parents, const std::vector<double>& chances, const std::vector<double>& gains,
               double least, size_t most, Seconds seconds) {
  if (parents.size() < chances.size()) throw std::invalid_argument("a parent is needed for each chance");
  const size_t drafted = chances.size();
  std::vector<double> ends(drafted + 1);  // by row, the last token's first: the chance that the path ends there
  ends[0] = 1.0;
  std::copy(chances.begin(), chances.end(), ends.begin() + 1);
  for (size_t node = 0; node < drafted; ++node) {
    const int32_t parent = parents[node];
    if (parent < -1 || parent >= static_cast<int32_t>(node)) throw std::invalid_argument("a parent comes before its node");
    ends[parent + 1] -= chances[node];
  }
  // Of equals a drafted row goes first, then the look-ahead row nearer to the token above it. A drafted row's chance is at
  // most its parent's, and a look-ahead row's value that of the one above it, so that any first rows hang together.
  struct Row {
    double value;
    int32_t place, node;  // place: of a look-ahead row below its node, -1 for a drafted one
    bool operator<(const Row& other) const {
      if (value != other.value) return value < other.value;
      return place != other.place ? place > other.place : node > other.node;
    }
  };
  std::priority_queue<Row> next;  // the drafted rows' first one, and that of each chain
  if (drafted) next.push({chances[0], -1, 0});
  for (size_t row = 0; row <= drafted && !gains.empty(); ++row) {
    if (ends[row] * gains[0] > least) next.push({ends[row] * gains[0], 0, static_cast<int32_t>(row) - 1});
  }
  Speed speed(most, seconds);
  std::vector<Row> rows;
  while (!next.empty() && rows.size() < most && speed.may_gain(next.top().value)) {
    Row row = next.top();
    next.pop();
    rows.push_back(row);
    speed.take(row.value);
    if (row.place < 0) {
      if (static_cast<size_t>(++row.node) < drafted) next.push({chances[row.node], -1, row.node});
    } else if (static_cast<size_t>(++row.place) < gains.size()) {
      next.push({ends[row.node + 1] * gains[row.place], row.place, row.node});
    }
  }
  const size_t taken = speed.best();
  Plan plan;
  std::vector<int32_t> below(drafted + 1, 0);
  for (size_t row = 0; row < taken; ++row) {
    if (rows[row].place < 0) {
      ++plan.kept;
    } else {
      ++below[rows[row].node + 1];
    }
  }
  for (size_t row = 0; row <= plan.kept; ++row) {  // a node that is not kept has no rows below it
    if (below[row]) plan.chains.emplace_back(static_cast<int32_t>(row) - 1, below[row]);
  }
  return plan;
}

Drafted Guesses::draft(size_t most, double least, const Predictions& predictions, Seconds seconds, size_t ahead,
                       double least_value) const {
  Grown grown = grow(most, least, predictions, seconds);
  Speed speed(most, seconds);
  for (const double chance : grown.chances) speed.take(chance);
  grown.chances.resize(speed.best());
  std::vector<double> gains;
  for (size_t place = 0; place < ahead; ++place) {
    const double rate = rates_.rate({kOnlyPass, static_cast<int>(place) + 1, 0});
    gains.push_back(std::min(rate, gains.empty() ? 1.0 : gains.back()));
  }
  Plan plan = plan_rows(grown.parents, grown.chances, gains, least_value, most, seconds);
  Drafted drafted{tokens_.empty() ? -1 : tokens_.back(), std::move(grown.tokens), std::move(grown.parents),
                  std::move(grown.sources), std::move(plan.chains)};
  for (size_t node = 0; node < plan.kept; ++node) drafted.expected += grown.chances[node];
  drafted.tokens.resize(plan.kept);
  drafted.parents.resize(plan.kept);
  drafted.sources.resize(plan.kept);
  for (const auto& [node, rows] : drafted.chains) {
    for (int32_t row = 0, parent = node; row < rows; ++row) {
      drafted.parents.push_back(parent);
      parent = static_cast<int32_t>(drafted.tokens.size());
      drafted.tokens.push_back(-1);
      drafted.sources.push_back(kSources);
    }
  }
  return drafted;
}

void Guesses::observe(const std::vector<int32_t>& emitted, const Predictions& predictions,
                      const std::vector<int32_t>& tokens, const std::vector<int32_t>& parents,
                      const std::vector<int32_t>& accepted, Successors successors) {
  const auto rows = static_cast<int32_t>(tokens.size());
  if (parents.size() != tokens.size() || successors.rows != tokens.size() + 1) {
    throw std::invalid_argument("a parent and successors are needed for each row, and successors of the sequence");
  }
  for (int32_t row = 0; row < rows; ++row) {
    if (parents[row] < -1 || parents[row] >= row) throw std::invalid_argument("a parent comes before its node");
  }
  std::vector<bool> on_path(rows);
  for (const int32_t node : accepted) {
    if (node < 0 || node >= rows) throw std::invalid_argument("no such node was accepted");
    on_path[node] = true;
  }
  if (tokens_.empty()) return;
  judge(emitted, predictions);
  const int32_t last = tokens_.back();
  const auto before = [&](int32_t row) { return parents[row] < 0 ? last : tokens[parents[row]]; };
  for (int32_t row = 0; row < rows; ++row) {
    after_pair_.prefetch(pair_key(before(row), tokens[row]));
    after_.prefetch(static_cast<uint32_t>(tokens[row]));
  }
  const auto likely = [&](size_t row) { return successors.values + row * successors.width; };
  const auto remember_row = [&](int32_t row) { remember(before(row), tokens[row], likely(row + 1), successors.width); };
  // What the accepted path shows holds longest, then what the likeliest rows do.
  for (int32_t row = rows - 1; row >= 0; --row) {
    if (tokens[row] >= 0 && !on_path[row]) remember_row(row);
  }
  remember(tokens_.size() > 1 ? tokens_[tokens_.size() - 2] : -1, last, likely(0),
           successors.width);
  for (const int32_t row : accepted) remember_row(row);
}

void Guesses::judge(const std::vector<int32_t>& emitted, const Predictions& predictions) {
  Tail above = tail();
  Found found;
  Candidates candidates;
  for (size_t depth = 0; depth < emitted.size(); ++depth) {
    find(above, depth, predictions, found);
    weigh(found, candidates, nullptr);
    for (int i = 0; i < candidates.tokens.count(); ++i) {
      agreement_.observe(candidates.sources[i], candidates.others[i], candidates.chances[i],
                         candidates.tokens[i] == emitted[depth]);
    }
    bool passed = false, others = false;
    for (int i = 0; i < found.tokens.count(); ++i) {
      const bool hit = found.tokens[i] == emitted[depth];
      rates_.observe(found.kinds[i], hit);
      (found.sources[i] == kPass ? passed : others) |= hit;
    }
    if (depth < predictions.size()) rates_.observe({kOnlyPass, static_cast<int>(depth) + 1, 0}, passed && !others);
    above.push(emitted[depth], longest_);
  }
  for (size_t depth = emitted.size(); depth < predictions.size(); ++depth) {
    rates_.observe({kOnlyPass, static_cast<int>(depth) + 1, 0}, false);
  }
}

int32_t* Guesses::store(FlatTable& table, uint64_t key, const int32_t* successors, size_t count) {
  count = std::min<size_t>(count, kMostRank);
  if (table.width() < kSuccessorsHead + count) table.widen(kSuccessorsHead + count);
  int32_t* row = table.insert(key);
  row[1] = static_cast<int32_t>(count);
  std::copy_n(successors, count, row + kSuccessorsHead);
  return row;
}

void Guesses::remember(int32_t before, int32_t token, const int32_t* successors, size_t count) {
  store(after_, static_cast<uint32_t>(token), successors, count);
  const uint64_t pair = pair_key(before, token);
  store(after_pair_, pair, successors, count)[0] = ++clock_;
  updates_.emplace_back(pair, clock_);
  while (!updates_.empty()) {
    const auto [oldest, when] = updates_.front();
    const bool current = after_pair_.find(oldest)[0] == when;
    if (current && after_pair_.size() <= pairs_) break;
    if (current) after_pair_.erase(oldest);
    updates_.pop_front();
  }
}

}  // namespace shoestring
