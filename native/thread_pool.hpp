// Worker threads that help the calling thread through the phases of a job.
//
// A job is a sequence of phases; a phase is a number of units of work that threads claim in pieces. A phase is over
// when all its units are done, not when all threads have arrived: a thread that the system has put aside delays
// nobody unless it holds a piece, and finds later that the work was done without it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace shoestring {

class ThreadPool;

class Job {
 public:
  explicit Job(int phases) : phases_(static_cast<size_t>(phases)) {}
  virtual ~Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Runs on every thread that takes part; `thread` is below the pool's number of threads. All threads go through
  // the same phases in the same order.
  virtual void work(int thread) = 0;

 protected:
  // One thread's way through the phases.
  class Walk {
   public:
    Walk(Job& job, int threads) : job_(job), threads_(threads) {}

    // Does a share of [0, total) by calling body(begin, end) with pieces that begin at multiples of `grain`; returns
    // when the whole phase is done.
    template <typename Body>
    void phase(int64_t total, int64_t grain, Body&& body) {
      phase(total, grain, body, nullptr);
    }

    // As above; whichever thread does the last piece also calls last(), while the others wait.
    template <typename Body, typename Last>
    void phase(int64_t total, int64_t grain, Body&& body, Last&& last) {
      constexpr bool kHasLast = !std::is_same_v<std::decay_t<Last>, std::nullptr_t>;
      if (total <= 0) return;
      Phase& phase = job_.phases_[static_cast<size_t>(next_++)];
      int64_t begin = phase.claimed.load(std::memory_order_relaxed);
      while (begin < total) {
        // Large pieces first, small ones at the end, so that threads finish together.
        int64_t piece = threads_ > 1 ? (total - begin) * 5 / (8 * threads_) / grain * grain : total;
        if (piece < grain) piece = grain;
        const int64_t end = begin + piece < total ? begin + piece : total;
        if (!phase.claimed.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        body(begin, end);
        const int64_t done = phase.done.fetch_add(end - begin, std::memory_order_acq_rel) + (end - begin);
        if constexpr (kHasLast) {
          if (done == total) {
            last();
            phase.done.store(total + 1, std::memory_order_release);
          }
        }
        begin = phase.claimed.load(std::memory_order_relaxed);
      }
      wait_until(phase.done, kHasLast ? total + 1 : total);
    }

   private:
    Job& job_;
    int threads_;
    int64_t next_ = 0;
  };

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> done{0};
  };

  // Spins for a moment, then lets other threads run.
  static void wait_until(const std::atomic<int64_t>& done, int64_t total);

  std::vector<Phase> phases_;
};

// Processors that this process may run on.
int available_processors();

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // A pool of this many threads, shared by all that ask while it lives: models that take turns do not compete.
  static std::shared_ptr<ThreadPool> shared(int threads);

  int threads() const { return threads_; }

  // Runs the job on the calling thread and on all workers that are free; returns when the caller's part is over, which
  // is when all phases are. One job at a time; after a fork the child starts its own workers.
  void run(const std::shared_ptr<Job>& job);

 private:
  struct Crew;

  int threads_;
  std::unique_ptr<Crew> crew_;
};

}  // namespace shoestring
