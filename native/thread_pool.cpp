#include "thread_pool.hpp"

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace shoestring {
namespace {

// Polls before a waiting thread starts to yield: some ten microseconds.
constexpr int kSpins = 256;
// How long an idle worker looks for a next job before it sleeps.
constexpr std::chrono::microseconds kPatience{500};

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long process_id() {
#if defined(_WIN32)
  return 0;
#else
  return static_cast<long>(getpid());
#endif
}

}  // namespace

void Job::wait_until(const std::atomic<int64_t>& done, int64_t total) {
  for (int spin = 0; done.load(std::memory_order_acquire) < total; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

int available_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

// What the workers share. A forked child has none of its parent's threads and may have its locks in any state: it leaves the
// parent's crew alone and makes its own.
struct ThreadPool::Crew {
  struct Board {
    std::mutex mutex;
    std::condition_variable wake;
    std::shared_ptr<Job> job;         // guarded by the mutex
    std::atomic<uint64_t> posted{0};  // how many jobs there were
    std::atomic<bool> stop{false};
  };

  std::shared_ptr<Board> board = std::make_shared<Board>();
  std::mutex turn;  // one job at a time
  std::vector<std::thread> workers;
  long process = process_id();

  explicit Crew(int threads) {
    for (int thread = 1; thread < threads; ++thread) workers.emplace_back(&Crew::serve, board, thread);
  }

  ~Crew() {
    {
      const std::lock_guard<std::mutex> lock(board->mutex);
      board->stop = true;
    }
    board->wake.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  static void serve(const std::shared_ptr<Board>& board, int thread) {
    uint64_t seen = 0;
    for (;;) {
      wait_for_job(*board, seen);
      std::shared_ptr<Job> job;
      {
        const std::lock_guard<std::mutex> lock(board->mutex);
        if (board->stop) return;
        seen = board->posted.load(std::memory_order_relaxed);
        job = board->job;
      }
      if (job) job->work(thread);
    }
  }

  static void wait_for_job(Board& board, uint64_t seen) {
    const auto news = [&] { return board.posted.load(std::memory_order_acquire) != seen || board.stop; };
    for (int spin = 0; spin < kSpins; ++spin) {
      if (news()) return;
      relax();
    }
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (std::chrono::steady_clock::now() < deadline) {
      if (news()) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(board.mutex);
    board.wake.wait(lock, news);
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads), crew_(new Crew(threads_)) {}

ThreadPool::~ThreadPool() {
  if (crew_->process != process_id()) crew_.release();  // the threads are another process's
}

std::shared_ptr<ThreadPool> ThreadPool::shared(int threads) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<ThreadPool>> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<ThreadPool> pool = pools[threads].lock();
  if (!pool) {
    pool = std::make_shared<ThreadPool>(threads);
    pools[threads] = pool;
  }
  return pool;
}

void ThreadPool::run(const std::shared_ptr<Job>& job) {
  if (crew_->process != process_id()) {
    crew_.release();  // on purpose: see Crew
    crew_.reset(new Crew(threads_));
  }
  Crew& crew = *crew_;
  const std::lock_guard<std::mutex> turn(crew.turn);
  if (threads_ > 1) {
    {
      const std::lock_guard<std::mutex> lock(crew.board->mutex);
      crew.board->job = job;
      crew.board->posted.fetch_add(1, std::memory_order_release);
    }
    crew.board->wake.notify_all();
  }
  job->work(0);
  if (threads_ > 1) {
    const std::lock_guard<std::mutex> lock(crew.board->mutex);
    crew.board->job.reset();
  }
}

}  // namespace shoestring
