// The host side of the LSTM's GPU kernels, csrc/lstm/cuda/launch.cu, on the fake runtime of runtime/: limits
// set before a launch, and refused launches. Exits 0 if all checks hold.
#define TT_SCALAR float
#define TT_FIRST_SCALAR
#define TT_ARCHITECTURES "none"

#include <cstdio>

#include "lstm/cuda/gpu.cpp"
#include "lstm/cuda/launch.cu"

using namespace throughtime;

namespace {

int wrong = 0;
void expect(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  ++wrong;
}

constexpr int kMost = 227 << 10;  // bytes of shared memory of a block
constexpr int kMultiprocessors = 132;

void use_h100() {
  const auto shared = fake.shared;  // a kernel keeps its limits
  fake = {};
  fake.shared = shared;
  fake.attributes = {{cudaDevAttrMultiProcessorCount, kMultiprocessors},
                     {cudaDevAttrMaxSharedMemoryPerBlockOptin, kMost},
                     {cudaDevAttrClusterLaunch, 1},
                     {cudaDevAttrComputeCapabilityMajor, 9}};
}

RecurrenceShape shape(int64_t H) { return {100, 16, 1, H, 4, false}; }
RecurrencePlan forced(Tier tier, int64_t H) {
  return plan(shape(H), {90, kMultiprocessors, kMost, 16, 1.755, 3350}, tier);
}
bool run_forward(const RecurrencePlan& plan) {
  return run_persistent(plan, RecurrenceForward<float>{}, nullptr, nullptr);
}

// A launch must not lower the limits that another thread has set for its own launch.
void shared_memory_is_set_once() {
  use_h100();
  most_cluster_blocks(0);
  RecurrencePlan large = forced(Tier::kResident, 128), small = large;
  large.shared_bytes = kMost;
  small.shared_bytes = 1 << 10;
  for (const int device : {0, 1, 0}) {
    fake.device = device;
    for (const RecurrencePlan* plan : {&large, &small, &large}) {
      expect(has_room(*plan) && run_forward(*plan), "a plan with shared memory does not run");
    }
  }
  expect(!fake.shared.empty(), "no limit was set");
  for (const auto& [where, limit] : fake.shared) {
    expect(limit == std::make_pair(kMost, 1), "shared memory was set twice, or not to the most");
  }
}

void a_launch_without_room_returns_false() {
  use_h100();
  for (const auto& [tier, status] :
       {std::make_pair(Tier::kGrid, cudaErrorCooperativeLaunchTooLarge),
        std::make_pair(Tier::kResident, cudaErrorInvalidClusterSize)}) {
    const RecurrencePlan plan = forced(tier, 256);
    expect(plan.tier == tier, "no such plan");
    std::vector<char> workspace(workspace_bytes(plan, shape(256)));
    fake.launched = status;
    expect(!run_persistent(plan, RecurrenceForward<float>{}, workspace.data(), nullptr),
           "a launch that found no room counts as run");
    expect(fake.last == cudaSuccess, "the error waits for the next call");
  }
  fake.launched = cudaErrorInvalidValue;
  try {
    run_forward(forced(Tier::kResident, 256));
    expect(false, "an error was swallowed");
  } catch (const CudaError&) {
  }
}

void plans_fit_the_room() {
  use_h100();
  const Gpu gpu{90, kMultiprocessors, kMost, 16, 1.755, 3350};
  const auto made = [&](Tier only, int64_t H) {
    return plan_where_room(shape(H), gpu, only, has_room);
  };
  expect(made(Tier::kGrid, 512).tier == Tier::kGrid, "a whole GPU has no room for a grid");
  fake.attributes[cudaDevAttrMultiProcessorCount] = 20;
  const RecurrencePlan part = made(Tier::kGrid, 256);
  expect(part.tier == Tier::kGrid && part.blocks() <= 20, "a grid does not fit 20 multiprocessors");
  fake.blocks_at_once = 0;
  expect(made(Tier::kGrid, 512).tier == Tier::kNone, "a forced grid without room has no reason");
  fake.most_cluster = 1;
  expect(made(Tier::kNone, 512).tier == Tier::kStepwise, "without room all is not stepwise");
  expect(made(Tier::kResident, 32).tier == Tier::kResident, "one block has no room");
}

}  // namespace

int main() {
  shared_memory_is_set_once();
  a_launch_without_room_returns_false();
  plans_fit_the_room();
  return wrong == 0 ? 0 : 1;
}
