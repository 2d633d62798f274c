#include "lstm/cpu/kernels.h"

#include "lstm/cpu/cell.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace throughtime {
namespace {

static_assert(LstmCell<float>::kGates == kLstmGates && LstmCell<float>::kSaved == kLstmSaved);

template <typename S>
void forward(const LstmForward<S>& args, const Runtime& runtime) {
  ForwardWalk<LstmCell<S>>(args, runtime).run(runtime);
}

template <typename S>
void backward(const LstmBackward<S>& args, const Runtime& runtime) {
  BackwardWalk<LstmCell<S>>(args, runtime).run(runtime);
}

int64_t multiply_adds(int64_t repeats) {
  constexpr int64_t kDepth = 32, kColumns = kPanelVectors * kLanes<float>;
  alignas(kVectorBytes) float a[kRegisterRows * kDepth] = {};
  alignas(kVectorBytes) float panel[kDepth * kColumns] = {};
  Tile<float, kRegisterRows, kPanelVectors> tile;
  tile.clear();
  for (int64_t n = 0; n < repeats; ++n) {
    asm volatile("" ::: "memory");  // the operands may have changed: nothing is hoisted
    tile.multiply(a, kDepth, 1, panel, kDepth, kColumns);
  }
  TileBuffer<float> sink;
  tile.write(sink.numbers, kColumns);
  asm volatile("" ::"r"(sink.numbers) : "memory");
  return repeats * kRegisterRows * kColumns * kDepth;
}

// A walk whose steps have no work.
class Meetings {
 public:
  explicit Meetings(int64_t times) : times_(times) {}
  int64_t blocks() const { return 1; }
  void prepare(Share) {}
  void walk(const Member& member) {
    for (int64_t n = 0; n < times_; ++n) member.wait();
  }
  void finish(Share) {}

 private:
  int64_t times_;
};

void meet(const Runtime& runtime, int members, int64_t times) {
  Barrier barriers[2];
  Meetings meetings(times);
  run_workers(runtime, WalkSchedule{1, members}, barriers, meetings);
}

}  // namespace

extern const LstmKernels TT_KERNELS(lstm);
const LstmKernels TT_KERNELS(lstm) = {{forward<float>, forward<double>},
                                      {backward<float>, backward<double>},
                                      multiply_adds,
                                      meet,
                                      kVectorBytes};

}  // namespace throughtime
