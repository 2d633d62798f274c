// How many CPUs this process may use, and how many of them are free for it.
//
// Workers of a team wait for each other in a loop, so one that has no CPU holds up all others: a
// container with two CPUs of a host with 64 gets 64 threads from torch, and runs best on two.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

namespace throughtime {

struct Cpus {
  int affinity;  // that the system lets the calling thread run on
  double quota;  // that the control groups grant, 0 without a limit
  int taken;     // that others were seen to use

  int usable() const;  // at least 1
};

// Now. Costs a system call.
Cpus cpus();

// For tests: as if there were `count` free CPUs; 0: what the system says.
void pretend_cpus(int count);

// The quota of this process in CPUs, 0 without a limit: the least of its control group and of all
// above it, version 1 and 2. Reads /proc/self and the mounted control groups under `root`.
double cgroup_quota(const std::string& root);

// Sees whether the workers of one parallel region had a CPU each. A worker lacks one while it is to
// run and does not, its late start included; its sleep at a barrier is no lack.
//
// A region tells something if a worker lacked a CPU for a quarter of its time, and if it had no more
// workers than regions may have now. Regions then have that many workers fewer as CPUs were lacking
// on average, at least one: never fewer than that region had CPUs, rounded down. After a tenth of a
// second in which no worker lacked a CPU one more is tried, after the next two more, then four, and
// so on. So workers come to have a CPU each in a few regions, each trial of one more while others
// keep their CPUs spoils one region, and within a second all of 128 CPUs are used again.
class RegionWatch {
 public:
  explicit RegionWatch(int workers);
  ~RegionWatch();
  RegionWatch(const RegionWatch&) = delete;
  RegionWatch& operator=(const RegionWatch&) = delete;

  // Lives as long as a worker works.
  class Worker {
   public:
    explicit Worker(RegionWatch* region);
    ~Worker();
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

   private:
    RegionWatch* const region_;
    const int64_t began_, ran_before_, slept_before_;
  };

 private:
  const int workers_;
  const std::thread::id caller_;
  const int64_t start_;
  std::atomic<int64_t> called_{0};              // when the calling thread began its own work
  std::atomic<int64_t> most_{0}, together_{0};  // nanoseconds that workers lacked a CPU
};

}  // namespace throughtime
