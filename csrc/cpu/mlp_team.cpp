#include "cpu/mlp_team.h"

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace dit_fast::cpu {
namespace {

// What the threads of a team share.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const Index round = round_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

  std::mutex mutex_;

 private:
  std::condition_variable all_here_;
  int size_, arrived_ = 0;
  Index round_ = 0;
};

struct Threads {
  int rank, size;
  Meeting& meeting;

  void sync() const {
    if (size > 1) meeting.wait();
  }
  void add(double* at, double value) const {
    const std::lock_guard<std::mutex> lock(meeting.mutex_);
    *at += value;
  }
  void raise(Index* at, Index value) const {
    const std::lock_guard<std::mutex> lock(meeting.mutex_);
    *at = std::max(*at, value);
  }
};

template <class Work>
void run_groups(Index num_models, int group_size, Index num_bytes, int team_size, Work work) {
  for (Index group = 0; group * group_size < num_models; ++group) {
    // what is read before it is written shows as NaN
    std::vector<double> memory(static_cast<std::size_t>(num_bytes + 7) / 8, std::numeric_limits<double>::quiet_NaN());
    Meeting meeting(team_size);
    std::vector<std::thread> others;
    for (int rank = 1; rank < team_size; ++rank)
      others.emplace_back([&, rank] { work(Threads{rank, team_size, meeting}, group, memory.data()); });
    work(Threads{0, team_size, meeting}, group, memory.data());
    for (std::thread& thread : others) thread.join();
  }
}

}  // namespace

template <class Real>
void team_sweep(const team::Sweep<Real>& args, int team_size) {
  run_groups(
      args.run.K, args.run.net.G, args.run.net.num_bytes, team_size,
      [&](const Threads& threads, Index group, double* memory) { team::sweep_columns(threads, args, group, memory); });
}

template <class Real>
void team_retrain(const team::Retrain<Real>& args, int team_size) {
  run_groups(
      args.run.K, args.run.net.G, args.run.net.num_bytes, team_size,
      [&](const Threads& threads, Index group, double* memory) { team::retrain_models(threads, args, group, memory); });
}

template void team_sweep(const team::Sweep<float>&, int);
template void team_sweep(const team::Sweep<double>&, int);
template void team_retrain(const team::Retrain<float>&, int);
template void team_retrain(const team::Retrain<double>&, int);

}  // namespace dit_fast::cpu
