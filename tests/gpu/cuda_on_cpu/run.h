// Runs the LSTM's GPU kernels on the CPU.
#pragma once

#include <vector>

#include "lstm/cuda/persistent.cuh"
#include "lstm/cuda/stepwise.cuh"

namespace throughtime {

template <typename S>
constexpr bool kIsBackward = false;
template <typename S>
constexpr bool kIsBackward<RecurrenceBackward<S>> = true;

template <typename S, template <typename> class Params>
bool run_persistent(const RecurrencePlan& plan, Params<S> p) {
  constexpr bool backward = kIsBackward<Params<S>>;
  const RecurrenceShape shape{p.in.T, p.in.B, p.in.D, p.in.H, sizeof(S), backward};
  std::vector<unsigned> arrivals(plan.directions * plan.partition.groups * kArrivalStride, 0);
  std::vector<char> exchange(plan.exchange_bytes(shape), '\xff');
  p.in.partition = plan.partition;
  p.in.partition.arrivals = arrivals.data();
  p.in.partition.exchange = exchange.data();
  TT_OBSERVE("exchange", reinterpret_cast<intptr_t>(exchange.data()), exchange.size());
  return launch_persistent(plan, p, [&](auto kernel, const auto& arguments) {
    device::launch(kernel, arguments, plan.blocks(), plan.threads, plan.cluster(),
                   plan.shared_bytes, plan.tier == Tier::kGrid);
  });
}

// product [rows, columns] = a b, where a(row, k) and b(k, column) have `inner` k.
template <typename Left, typename Right>
void multiply(const Left& a, int64_t rows, int64_t inner, int64_t columns, const Right& b,
              float* product) {
  device::count(device::work.products);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < inner; ++k)
        sum += device::to_float(a(i, k)) * device::to_float(b(k, j));
      product[i * columns + j] = sum;
    }
  }
}

// Threads of a step share nothing, so they may run one after the other: a thousand steps take a second.
// At once they prove it to the thread sanitizer.
inline bool steps_at_once = false;

inline auto launch_steps(int64_t threads) {
  return [=](auto kernel, const auto& arguments) {
    const auto blocks = static_cast<int>((threads + kStepThreads - 1) / kStepThreads);
    if (steps_at_once) {
      device::launch(kernel, arguments, blocks, kStepThreads, 1, 0, false);
    } else {
      device::launch_in_turn(kernel, arguments, blocks, kStepThreads);
    }
  };
}

template <typename S>
void run_stepwise(const RecurrenceForward<S>& p) {
  const int64_t B = p.in.B, D = p.in.D, H = p.in.H;
  std::vector<float> product(D * B * 4 * H);
  launch_stepwise(
      p, product.data(),
      [&](int64_t d, float* to) {
        const S* h = p.h_n + d * B * H;
        const S* weight = p.in.weight + d * 4 * H * H;
        multiply([&](int64_t n, int64_t k) { return h[n * H + k]; }, B, H, 4 * H,
                 [&](int64_t k, int64_t j) { return weight[j * H + k]; }, to);
      },
      launch_steps(D * B * H));
}

template <typename S>
void run_stepwise(const RecurrenceBackward<S>& p) {
  const int64_t B = p.in.B, D = p.in.D, H = p.in.H;
  std::vector<float> product(D * B * H);
  launch_stepwise(
      p, product.data(),
      [&](int64_t d, int64_t t) {
        for (int64_t n = 0; n < B; ++n) {
          if (!p.is_detached(d, t, n)) return true;
        }
        return false;
      },
      [&](int64_t d, int64_t t, float* to) {
        const S* da = p.dgates + (t * B * D + d) * 4 * H;
        const S* weight = p.in.weight + d * 4 * H * H;
        multiply([&](int64_t n, int64_t k) { return da[n * D * 4 * H + k]; }, B, 4 * H, H,
                 [&](int64_t k, int64_t j) { return weight[k * H + j]; }, to);
      },
      launch_steps(D * B * H));
}

// plan_with() for every tier; in the backward a block has a warp for every 8 units unless `warps` says
// otherwise. Of float weights 4 tiles are held in registers, or none.
inline RecurrencePlan plan_by_hand(const RecurrenceShape& s, Tier tier, int ranks, int tiles_n,
                                   int held, int parts, int warps) {
  if (tier == Tier::kStepwise) {
    RecurrencePlan plan{};
    plan.tier = tier;
    return plan;
  }
  const bool exists = instance_exists(s.scalar_bytes, s.backward, tiles_n, held);
  const int held_here = exists ? held : tiles_n == 1 ? 4 : 0;
  if (warps == 0) warps = static_cast<int>(divide_up(divide_up(s.H, ranks), kSlabUnits));
  return plan_with(s, tier, ranks, tiles_n, held_here, parts, warps);
}

// Runs the plan's tier; false if the plan's instance does not exist. The stepwise tier begins with the
// state in h_n and c_n, or in dh0 and dc0.
template <typename Params>
bool run(const RecurrencePlan& plan, const Params& p) {
  if (plan.tier == Tier::kStepwise) return run_stepwise(p), true;
  return run_persistent(plan, p);
}

}  // namespace throughtime
