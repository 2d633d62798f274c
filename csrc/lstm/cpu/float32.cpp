#include "lstm/cpu/float32.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace throughtime {

namespace {

constexpr int64_t kLeastUnits = 192, kLeastSteps = 8;
constexpr int64_t kMostTerms = 1 << 17;  // of a sum: see common/cpu/split.h

// Whether all numbers are below a bound: neither infinite nor NaN.
bool all_below(float bound, const float* numbers, int64_t count) {
  uint32_t limit, high = 0;
  std::memcpy(&limit, &bound, sizeof limit);
  for (int64_t i = 0; numbers && i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    high |= (bits & 0x7fffffffu) + (0x80000000u - limit);
  }
  return !(high & 0x80000000u);
}

// f(Share) for shares of [0, count) on all threads.
template <typename F>
void on_shares(const Runtime& runtime, int64_t count, const F& f) {
  struct Context {
    const F& f;
    int64_t count;
    int workers;
  } context{f, count, runtime.threads};
  runtime.parallel(
      runtime.threads,
      [](void* raw, int begin, int end) {
        const auto& [f, count, workers] = *static_cast<Context*>(raw);
        f(Share(count, begin, end, workers));
      },
      &context);
}

bool weights_fit(const LstmInput<float>& in, const Runtime& runtime) {
  const LstmShape& s = in.shape;
  bool fit = all_below(kSplitWeightBound, in.weight_hr, s.R * s.H);
  on_shares(runtime, kLstmGates * s.H, [&](Share rows) {
    const int64_t count = rows.end - rows.begin;
    if (!all_below(kSplitWeightBound, in.weight_ih + rows.begin * s.I, count * s.I) ||
        !all_below(kSplitWeightBound, in.weight_hh + rows.begin * s.R, count * s.R))
      __atomic_store_n(&fit, false, __ATOMIC_RELAXED);
  });
  return fit;
}

// Marks samples whose input, initial state or states after a reset the split kernels do not take.
void find_beyond(const LstmInput<float>& in, bool* beyond, const Runtime& runtime) {
  const LstmShape& s = in.shape;
  on_shares(runtime, s.B, [&](Share rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t sample = in.order[row];
      bool fit = all_below(kSplitBound, in.h0 + sample * s.R, s.R) &&
                 all_below(kSplitBound, in.c0 + sample * s.H, s.H);
      for (int64_t t = 0; fit && t < in.length(row); ++t)
        fit = all_below(kSplitBound, in.x + t * in.x_stride_t + sample * in.x_stride_b, s.I) &&
              (!in.resets(t, row) || (all_below(kSplitBound, in.reset_h_at(t, row), s.R) &&
                                      all_below(kSplitBound, in.reset_c_at(t, row), s.H)));
      beyond[sample] = !fit;
    }
  });
}

// The rows of a call whose samples are, or are not, beyond.
class Rows {
 public:
  Rows(const LstmInput<float>& in, const bool* beyond, bool wanted) : in_(in) {
    for (int64_t row = 0; row < in.shape.B; ++row) {
      if (beyond[in.order[row]] != wanted) continue;
      order_.push_back(in.order[row]);
      lengths_.push_back(in.length(row));
    }
  }
  int64_t count() const { return static_cast<int64_t>(order_.size()); }

  template <typename Pass>
  Pass of(const Pass& pass) const {
    Pass part = pass;
    part.in.shape.B = count();
    part.in.order = order_.data();
    if (in_.lengths) part.in.lengths = lengths_.data();
    return part;
  }

 private:
  const LstmInput<float>& in_;
  std::vector<int64_t> order_, lengths_;
};

// A pass of the rest, whose weight gradients are added to those of `pass`.
void add_rest(const LstmKernels& vectors, const Rows& rest, const LstmBackward<float>& pass,
              const Runtime& runtime) {
  const LstmShape& s = pass.in.shape;
  LstmBackward<float> part = rest.of(pass);
  struct Sum {
    float** place;
    float* whole;
    std::vector<float> own;
  } sums[] = {{&part.dweight_ih, pass.dweight_ih, std::vector<float>(kLstmGates * s.H * s.I)},
              {&part.dweight_hh, pass.dweight_hh, std::vector<float>(kLstmGates * s.H * s.R)},
              {&part.dbias, pass.dbias, std::vector<float>(kLstmGates * s.H)},
              {&part.dweight_hr, pass.dweight_hr, std::vector<float>(s.R * s.H)}};
  for (Sum& sum : sums)
    if (sum.whole) *sum.place = sum.own.data();
  vectors.backward(part, runtime);
  for (const Sum& sum : sums)
    for (size_t i = 0; sum.whole && i < sum.own.size(); ++i) sum.whole[i] += sum.own[i];
}

}  // namespace

bool fits_matrix_unit(const LstmShape& s) {
  return s.T >= kLeastSteps && s.H >= kLeastUnits && std::max(kLstmGates * s.H, s.I) <= kMostTerms;
}

void run_split(const LstmSplitKernels& split, const LstmKernels& vectors, int parts,
               const LstmForward<float>& pass, const Runtime& runtime) {
  if (!weights_fit(pass.in, runtime)) return vectors.forward(pass, runtime);
  const auto beyond = std::make_unique<bool[]>(pass.in.batch);
  find_beyond(pass.in, beyond.get(), runtime);
  const Rows within(pass.in, beyond.get(), false), rest(pass.in, beyond.get(), true);
  if (within.count() > 0) split.forward(within.of(pass), parts, runtime);
  if (rest.count() > 0) vectors.forward(rest.of(pass), runtime);
}

void run_split(const LstmSplitKernels& split, const LstmKernels& vectors, int parts,
               const LstmBackward<float>& pass, const Runtime& runtime) {
  if (!weights_fit(pass.in, runtime)) return vectors.backward(pass, runtime);
  const auto beyond = std::make_unique<bool[]>(pass.in.batch);
  find_beyond(pass.in, beyond.get(), runtime);
  // Gradients may leave the range on the way back. Rows are independent, so the others stay as they
  // are when the walk is taken again without those samples, whose part in weight gradients is wrong.
  for (;;) {
    const Rows within(pass.in, beyond.get(), false);
    if (within.count() == 0) return vectors.backward(pass, runtime);
    LstmBackward<float> part = within.of(pass);
    part.beyond = beyond.get();
    split.backward(part, parts, runtime);
    const Rows rest(pass.in, beyond.get(), true);
    if (within.count() + rest.count() > pass.in.shape.B) continue;
    if (rest.count() > 0) add_rest(vectors, rest, pass, runtime);
    return;
  }
}

}  // namespace throughtime
