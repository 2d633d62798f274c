#include "common/cpu/cpus.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <sstream>

#include "common/cpu/sleep.h"

#if defined(__linux__)
#include <sched.h>
#endif

// Knows the CPUs of the process also where OpenMP has bound the calling thread to one of them.
extern "C" __attribute__((weak)) int omp_get_num_procs();

namespace throughtime {
namespace {

constexpr int64_t kRetry = 100'000'000;  // nanoseconds
constexpr int64_t kNoise = 200'000;      // it takes that long to wake a thread

std::atomic<int> pretended{0};
std::atomic<int> taken{0};
std::atomic<int> next_tried{1};  // of those taken
std::atomic<int64_t> retry_at{0};

int affinity() {
  if (omp_get_num_procs) return omp_get_num_procs();
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

bool has_word(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

double positive_ratio(double quota, double period) {
  return quota > 0 && period > 0 ? quota / period : 0;
}

// What the files of one control group say, 0 without a limit.
double quota_of_group(const std::string& folder, bool version_2) {
  double quota = 0, period = 0;
  if (version_2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;  // "max" is not a number: 0
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // -1: no limit
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return positive_ratio(quota, period);
}

// The least of the group at `path` below the mount point and of all above it.
double quota_of_path(const std::string& mount, std::string path, bool version_2) {
  double least = 0;
  for (;;) {
    const double quota = quota_of_group(mount + path, version_2);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    if (path.empty()) return least;
    path.erase(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

// The path of this process in the hierarchy that has the CPU controller; false if there is none.
bool path_of_group(const std::string& root, bool version_2, std::string* path) {
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // 4:cpu,cpuacct:/path or 0::/path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version_2 ? controllers.empty() : has_word(controllers, "cpu")) {
      *path = line.substr(second + 1);
      return true;
    }
  }
  return false;
}

double quota_of_version(const std::string& root, bool version_2) {
  std::string path;
  if (!path_of_group(root, version_2, &path)) return 0;
  std::ifstream mounts(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    // id parent device ROOT MOUNT-POINT options [optional fields] - TYPE source SUPER-OPTIONS
    std::istringstream words(line);
    std::string word, top, mount, type, source, options;
    words >> word >> word >> word >> top >> mount;
    while (words >> word && word != "-") continue;
    words >> type >> source >> options;
    if (type != (version_2 ? "cgroup2" : "cgroup")) continue;
    if (!version_2 && !has_word(options, "cpu")) continue;
    // A container may see its own group mounted as the top, under the path that the host has.
    if (top == "/") top.clear();
    const bool inside = path.compare(0, top.size(), top) == 0;
    path = inside ? path.substr(top.size()) : "";
    return quota_of_path(root + mount, path == "/" ? "" : path, version_2);
  }
  return 0;
}

}  // namespace

double cgroup_quota(const std::string& root) {
  const double one = quota_of_version(root, false), two = quota_of_version(root, true);
  return one > 0 && two > 0 ? std::min(one, two) : one + two;
}

int Cpus::usable() const {
  int count = affinity;
  if (quota > 0) count = std::min(count, static_cast<int>(std::ceil(quota)));
  return std::max(1, count - taken);
}

Cpus cpus() {
  if (const int count = pretended.load(std::memory_order_relaxed)) return {count, 0, 0};
  static const double quota = cgroup_quota("");
  if (taken.load(std::memory_order_relaxed) > 0) {
    const int64_t now = nanoseconds(CLOCK_MONOTONIC);
    int64_t due = retry_at.load(std::memory_order_relaxed);
    if (now > due && retry_at.compare_exchange_strong(due, now + kRetry)) {
      taken = std::max(0, taken - next_tried);
      next_tried = 2 * next_tried;
    }
  }
  return {affinity(), quota, taken.load(std::memory_order_relaxed)};
}

void pretend_cpus(int count) { pretended.store(count, std::memory_order_relaxed); }

RegionWatch::RegionWatch(int workers)
    : workers_(workers),
      caller_(std::this_thread::get_id()),
      start_(nanoseconds(CLOCK_MONOTONIC)) {}

RegionWatch::~RegionWatch() {
  if (most_ < kNoise) return;
  const int64_t now = nanoseconds(CLOCK_MONOTONIC), length = now - start_;
  if (most_ < length / 4) return;
  if (pretended.load(std::memory_order_relaxed)) return;  // nothing is known of real CPUs
  retry_at.store(now + kRetry, std::memory_order_relaxed);
  const Cpus found = cpus();
  if (workers_ > found.usable()) return;  // that one lacks its CPU is known
  const int lacking = std::max(1, static_cast<int>(together_ / length));
  next_tried = 1;
  taken = found.taken + std::min(lacking, workers_ - 1);
}

RegionWatch::Worker::Worker(RegionWatch* region)
    : region_(region),
      began_(nanoseconds(CLOCK_MONOTONIC)),
      ran_before_(nanoseconds(CLOCK_THREAD_CPUTIME_ID)),
      slept_before_(slept) {
  if (std::this_thread::get_id() == region->caller_) region->called_ = began_;
}

RegionWatch::Worker::~Worker() {
  const int64_t ran = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - ran_before_;
  int64_t lacked = nanoseconds(CLOCK_MONOTONIC) - began_ - ran - (slept - slept_before_);
  // The calling thread begins its own work when it has started all others.
  if (const int64_t called = region_->called_) lacked += std::max<int64_t>(0, began_ - called);
  region_->together_ += lacked;
  int64_t most = region_->most_;
  while (lacked > most && !region_->most_.compare_exchange_weak(most, lacked)) continue;
}

}  // namespace throughtime
