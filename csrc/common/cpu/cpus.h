// How many CPUs this process may use, and how many of them are free for it.
//
// Workers of a team wait for each other in a loop, so one that has no CPU holds up all others: a
// container with two CPUs of a host with 64 gets 64 threads from torch, and runs best on two.
#pragma once

#include <cstdint>
#include <string>

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

// Tells whether the workers of one parallel region had a CPU each. If one had not, regions have a
// worker less for a tenth of a second, and then try again.
class RegionWatch {
 public:
  RegionWatch();
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
    const int64_t ran_before_;
  };

 private:
  const int64_t start_;
  int64_t waited_ = 0;  // nanoseconds that a worker was not running, the most
};

}  // namespace throughtime
