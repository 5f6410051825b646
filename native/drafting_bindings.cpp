#include "drafting_bindings.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <tuple>
#include <vector>

#include "drafting.hpp"
#include "thread_pool.hpp"

namespace nb = nanobind;

namespace shoestring {
namespace {

using Table = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

size_t count_of(int64_t most) { return most > 0 ? static_cast<size_t>(most) : 0; }
Seconds seconds_of(const Table& table) { return table.is_valid() ? Seconds{table.data(), table.shape(0)} : Seconds{}; }

struct Rates {
  std::shared_ptr<AcceptanceRates> shared;
};

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct HeldDatastore {
  std::shared_ptr<const Datastore> shared;
};

// Keeps the rates, the known successors and the datastore alive with the guesses that read them.
struct HeldGuesses {
  std::shared_ptr<AcceptanceRates> rates;
  Rows known;
  std::shared_ptr<const Datastore> datastore;
  Guesses guesses;

  HeldGuesses(std::shared_ptr<AcceptanceRates> held, int longest, size_t pairs)
      : rates(std::move(held)), guesses(*rates, longest, pairs) {}
};

// Drafts of several sequences, which share nothing that they write to. A worker may come late, so that it owns what it reads.
class DraftTogether : public Job {
 public:
  struct Each {
    Guesses* guesses;
    std::vector<int32_t> added;  // how its sequence has gone on
    Predictions predictions;
    Drafted drafted;
    std::exception_ptr error;
  };
  std::vector<Each> each;
  size_t most = 0, ahead = 0;
  double least = 0, least_value = 0;
  Seconds seconds;
  int threads = 1;

  DraftTogether() : Job(1) {}

  void work(int) override {
    Walk(*this, threads).phase(static_cast<int64_t>(each.size()), 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Each& one = each[static_cast<size_t>(i)];
        try {
          one.guesses->extend(one.added.data(), one.added.size());
          one.drafted = one.guesses->draft(most, least, one.predictions, seconds, ahead, least_value);
        } catch (...) {
          one.error = std::current_exception();
        }
      }
    });
  }
};

}  // namespace

void bind_drafting(nb::module_& module) {
  nb::class_<Rates>(module, "AcceptanceRates")
      .def(
          "__init__",
          [](Rates* self, const std::vector<std::vector<double>>& first, double prior_weight, double memory) {
            new (self) Rates{std::make_shared<AcceptanceRates>(first, prior_weight, memory)};
          },
          nb::arg("first"), nb::arg("prior_weight"), nb::arg("memory"))
      .def("set_prior", [](Rates& self, int source, int length, int rank,
                           double rate) { self.shared->set_prior({source, length, rank}, rate); })
      .def("rate",
           [](const Rates& self, int source, int length, int rank) { return self.shared->rate({source, length, rank}); })
      .def("observe", [](Rates& self, int source, int length, int rank, bool hit) {
        self.shared->observe({source, length, rank}, hit);
      });

  nb::class_<HeldDatastore>(module, "Datastore")
      .def(
          "__init__",
          [](HeldDatastore* self, const Tokens& tokens, int longest) {
            new (self) HeldDatastore{std::make_shared<Datastore>(tokens.data(), tokens.shape(0), longest)};
          },
          nb::arg("tokens"), nb::arg("longest"))
      .def("after", [](const HeldDatastore& self, const std::vector<int32_t>& tail) {
        const auto length = static_cast<int>(std::min<size_t>(tail.size(), kMostTail));
        const int32_t* const last = tail.data() + tail.size() - length;
        const Datastore::Match match = self.shared->find(last, length, GramKeys(last, length));
        return nb::make_tuple(match.length,
                              std::vector<int32_t>(match.tokens.begin(), match.tokens.begin() + match.count));
      });

  module.def(
      "plan_rows",
      [](const std::vector<int32_t>& parents, const std::vector<double>& chances, const std::vector<double>& gains,
         double least, int64_t most, const Table& seconds) {
        Plan plan = plan_rows(parents, chances, gains, least, count_of(most), seconds_of(seconds));
        return nb::make_tuple(plan.kept, plan.chains);
      },
      nb::arg("parents"), nb::arg("chances"), nb::arg("gains"), nb::arg("least"), nb::arg("most"),
      nb::arg("seconds").none());

  nb::class_<Drafted>(module, "Drafted")
      .def_ro("last", &Drafted::last)
      .def_ro("tokens", &Drafted::tokens)
      .def_ro("parents", &Drafted::parents)
      .def_ro("sources", &Drafted::sources)
      .def_ro("chains", &Drafted::chains)
      .def_ro("expected", &Drafted::expected)
      .def("__len__", &Drafted::size)
      .def("chain", &Drafted::chain)
      .def("tokens_of", &Drafted::tokens_of)
      .def("fits", &Drafted::fits)
      .def("walk", [](const Drafted& self, const Tokens& next) {
        Walk walked = walk(self, next.data(), next.shape(0));
        return nb::make_tuple(walked.path, walked.emitted);
      });

  nb::class_<HeldGuesses>(module, "Guesses")
      .def(
          "__init__",
          [](HeldGuesses* self, const Rates& rates, int longest, size_t pairs) {
            new (self) HeldGuesses(rates.shared, longest, pairs);
          },
          nb::arg("rates"), nb::arg("longest"), nb::arg("pairs"))
      .def("set_known",
           [](HeldGuesses& self, const Rows& known) {
             self.known = known;
             self.guesses.set_known(known.data(), known.shape(0), known.shape(1));
           })
      .def("set_datastore",
           [](HeldGuesses& self, const HeldDatastore& datastore) {
             self.datastore = datastore.shared;
             self.guesses.set_datastore(self.datastore.get());
           })
      .def("forget", [](HeldGuesses& self) { self.guesses.forget(); })
      .def("extend",
           [](HeldGuesses& self, const std::vector<int32_t>& tokens) { self.guesses.extend(tokens.data(), tokens.size()); })
      .def("__len__", [](const HeldGuesses& self) { return self.guesses.length(); })
      .def("grow",
           [](const HeldGuesses& self, int64_t most, double least, const Predictions& predictions, const Table& seconds) {
             Grown grown = self.guesses.grow(count_of(most), least, predictions, seconds_of(seconds));
             return nb::make_tuple(grown.tokens, grown.parents, grown.sources, grown.chances);
           },
           nb::arg("most"), nb::arg("least"), nb::arg("predictions"), nb::arg("seconds").none())
      .def("draft",
           [](const HeldGuesses& self, int64_t most, double least, const Predictions& predictions, const Table& seconds,
              size_t ahead, double least_value) {
             return self.guesses.draft(count_of(most), least, predictions, seconds_of(seconds), ahead, least_value);
           },
           nb::arg("most"), nb::arg("least"), nb::arg("predictions"), nb::arg("seconds").none(), nb::arg("ahead"),
           nb::arg("least_value"))
      .def("observe", [](HeldGuesses& self, const std::vector<int32_t>& emitted, const Predictions& predictions,
                         const nb::object& draft, const std::vector<int32_t>& accepted, const Rows& successors) {
        const Successors likely{successors.data(), successors.shape(0), successors.shape(1)};
        if (const Drafted* drafted = nullptr; nb::try_cast(draft, drafted)) {
          self.guesses.observe(emitted, predictions, drafted->tokens, drafted->parents, accepted, likely);
        } else {
          self.guesses.observe(emitted, predictions, nb::cast<std::vector<int32_t>>(draft.attr("tokens")),
                               nb::cast<std::vector<int32_t>>(draft.attr("parents")), accepted, likely);
        }
      });

  module.def(
      "draft_together",
      [](const std::vector<std::tuple<HeldGuesses*, nb::list, Predictions>>& sequences, int64_t most, double least,
         const Table& seconds, size_t ahead, double least_value, int threads) {
        static std::shared_ptr<ThreadPool> pool;  // the threads that drafted last: they look out for more
        if (threads > 1 && (!pool || pool->threads() != threads)) pool = ThreadPool::shared(threads);
        const auto job = std::make_shared<DraftTogether>();
        job->most = count_of(most), job->least = least, job->seconds = seconds_of(seconds);
        job->ahead = ahead, job->least_value = least_value, job->threads = threads;
        job->each.reserve(sequences.size());
        for (const auto& [held, tokens, predictions] : sequences) {
          job->each.push_back({&held->guesses, {}, predictions, {}, nullptr});
          for (size_t i = held->guesses.length(); i < tokens.size(); ++i) {
            job->each.back().added.push_back(nb::cast<int32_t>(tokens[i]));
          }
        }
        {
          nb::gil_scoped_release release;
          if (threads > 1) {
            std::shared_ptr<ThreadPool>(pool)->run(job);
          } else {
            job->work(0);
          }
        }
        nb::list drafted;
        for (const DraftTogether::Each& one : job->each) {
          if (one.error) std::rethrow_exception(one.error);
        }
        for (DraftTogether::Each& one : job->each) drafted.append(nb::cast(std::move(one.drafted)));
        return drafted;
      },
      nb::arg("sequences"), nb::arg("most"), nb::arg("least"), nb::arg("seconds").none(), nb::arg("ahead"),
      nb::arg("least_value"), nb::arg("threads"));
}

}  // namespace shoestring
