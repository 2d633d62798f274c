// Picks the instance of a persistent kernel that a plan names, and launches it.
#pragma once

#include <type_traits>

#include "lstm/cuda/backward.cuh"
#include "lstm/cuda/forward.cuh"
#include "lstm/cuda/plan.h"

namespace throughtime {

template <int n>
using Constant = std::integral_constant<int, n>;

template <typename S, bool kBackward, int kTiles, int kHeld, typename Visit>
bool try_instance(const RecurrencePlan& plan, const Visit& visit) {
  if constexpr (instance_exists(sizeof(S), kBackward, kTiles, kHeld)) {
    if (plan.tiles_n == kTiles && plan.held == kHeld) {
      if (plan.tier == Tier::kGrid) {
        visit(Constant<kTiles>{}, Constant<kHeld>{}, std::true_type{});
      } else {
        visit(Constant<kTiles>{}, Constant<kHeld>{}, std::false_type{});
      }
      return true;
    }
  }
  return false;
}

// visit(tiles of samples, tiles of weights in registers, whether a grid exchanges), all as compile-time
// constants; false if no such instance is built.
template <typename S, bool kBackward, typename Visit>
bool with_instance(const RecurrencePlan& plan, const Visit& visit) {
  return try_instance<S, kBackward, 1, 0>(plan, visit) ||
         try_instance<S, kBackward, 1, 4>(plan, visit) ||
         try_instance<S, kBackward, 1, 8>(plan, visit) ||
         try_instance<S, kBackward, 2, 0>(plan, visit) ||
         try_instance<S, kBackward, 2, 4>(plan, visit) ||
         try_instance<S, kBackward, 4, 0>(plan, visit);
}

// launcher(kernel, arguments) starts plan.blocks() blocks; false if the instance is not built.
template <typename S, typename Launcher>
bool launch_persistent(const RecurrencePlan& plan, const RecurrenceForward<S>& p,
                       const Launcher& launcher) {
  return with_instance<S, false>(plan, [&](auto tiles, auto held, auto grid) {
    launcher(
        &lstm_walk_forward<S, decltype(tiles)::value, decltype(held)::value, decltype(grid)::value>,
        p);
  });
}
template <typename S, typename Launcher>
bool launch_persistent(const RecurrencePlan& plan, const RecurrenceBackward<S>& p,
                       const Launcher& launcher) {
  return with_instance<S, true>(plan, [&](auto tiles, auto held, auto grid) {
    launcher(&lstm_walk_backward<S, decltype(tiles)::value, decltype(held)::value,
                                 decltype(grid)::value>,
             p);
  });
}

}  // namespace throughtime
