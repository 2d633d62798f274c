// The LSTM's GPU kernels on the CPU under a sanitizer: every tier and every barrier, compared with a
// loop in double precision. Without Python, which sanitizers do not know.
//
//     main [SITE CASE]    leaves out barrier SITE (its number in device.cuh) and runs one case
//
// Exits 0 if all is equal, 1 otherwise; a sanitizer that finds something has its own status.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "run.h"

using namespace throughtime;

namespace {

struct Case {
  Tier tier;
  int T, B, D, H;
  int tiles_n, held, ranks, forward_parts, backward_parts, backward_warps;
  bool lengths, reset, detach, reverse;
};

constexpr Case kCases[] = {
    // One block, warps that share an inner dimension, more jobs than warps.
    {Tier::kResident, 4, 9, 1, 72, 1, 0, 1, 2, 3, 9, true, true, true, false},
    {Tier::kResident, 4, 3, 2, 40, 2, 0, 1, 1, 1, 6, true, false, true, true},
    // Clusters of two and four blocks, the last of them partly empty. Six steps: each of two mailboxes
    // and buffers takes two rounds and more.
    {Tier::kResident, 6, 5, 1, 40, 1, 0, 2, 2, 1, 3, false, true, true, true},
    {Tier::kResident, 6, 11, 1, 56, 2, 0, 4, 1, 2, 2, true, true, false, false},
    // Blocks of a grid, in both directions.
    {Tier::kGrid, 6, 9, 2, 40, 1, 0, 3, 2, 2, 2, true, true, true, false},
    {Tier::kGrid, 6, 3, 1, 24, 1, 0, 3, 1, 1, 1, false, false, false, true},
    {Tier::kStepwise, 3, 3, 2, 8, 0, 0, 1, 1, 1, 1, true, true, true, true},
};

template <typename S>
struct Numbers {
  std::vector<S> weight, h0, dy, dh_n;
  std::vector<float> projected, bias, c0, dc_n;
  std::vector<int64_t> lengths;
  std::vector<char> reset, detach;  // bool has no vector of its own
};

template <typename S>
Numbers<S> draw(const Case& c) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](auto& to, size_t count, float scale) {
    to.resize(count);
    for (auto& x : to) x = device::from_float<std::decay_t<decltype(x)>>(scale * normal(random));
  };
  const size_t state = static_cast<size_t>(c.D) * c.B * c.H;
  Numbers<S> n;
  fill(n.weight, 4 * static_cast<size_t>(c.D) * c.H * c.H,
       1.5f / std::sqrt(static_cast<float>(c.H)));
  fill(n.h0, state, 1);
  fill(n.dy, c.T * state, 1);
  fill(n.dh_n, state, 1);
  fill(n.projected, c.T * state * 4, 1);
  fill(n.bias, 4 * static_cast<size_t>(c.D) * c.H, 1);
  fill(n.c0, state, 1);
  fill(n.dc_n, state, 1);
  for (int b = 0; b < c.B; ++b) n.lengths.push_back(b == 0 ? c.T : b == 1 ? 0 : 1 + b % c.T);
  for (int i = 0; i < c.D * c.T * c.B; ++i) {
    n.reset.push_back(random() % 4 == 0);
    n.detach.push_back(random() % 2 == 0);
  }
  for (int d = 0; d < c.D; ++d) {  // one step that nothing flows through
    for (int b = 0; b < c.B; ++b) n.detach[(d * c.T + (d == 0 ? 0 : c.T - 1)) * c.B + b] = 1;
  }
  return n;
}

template <typename S>
struct Results {
  std::vector<S> y, h_n, dgates;
  std::vector<SavedGate<S>> gates;
  std::vector<float> c_n, cells, dh0, dc0;
};

template <typename S>
RecurrenceInput<S> input(const Case& c, const Numbers<S>& n) {
  RecurrenceInput<S> in{};
  in.T = c.T;
  in.B = c.B;
  in.D = c.D;
  in.H = c.H;
  in.weight = n.weight.data();
  in.c0 = n.c0.data();
  in.lengths = c.lengths ? n.lengths.data() : nullptr;
  in.reset = c.reset ? reinterpret_cast<const bool*>(n.reset.data()) : nullptr;
  in.reverse = c.reverse;
  return in;
}

RecurrencePlan cut(const Case& c, int scalar_bytes, bool backward) {
  RecurrencePlan plan{};
  plan.tier = c.tier;
  plan.partition.grid = c.tier == Tier::kGrid;
  plan.partition.ranks = c.ranks;
  plan.partition.units = static_cast<int>(round_up(divide_up(c.H, c.ranks), kSlabUnits));
  plan.partition.parts = backward ? c.backward_parts : c.forward_parts;
  plan.tiles_n = c.tiles_n;
  plan.held = scalar_bytes == 2 ? c.held : 0;
  if (c.tier == Tier::kStepwise) return plan;
  plan.directions = c.D;
  plan.partition.groups = static_cast<int>(divide_up(c.B, 8 * c.tiles_n));
  const int warps =
      backward ? c.backward_warps : plan.partition.units / kSlabUnits * plan.partition.parts;
  plan.threads = 32 * warps;
  plan.shared_bytes =
      backward ? backward_layout(c.H, plan.partition.units, c.ranks, plan.partition.parts, warps,
                                 plan.partition.grid, c.tiles_n, plan.held, scalar_bytes)
                     .bytes
               : forward_layout(c.H, plan.partition.units, plan.partition.parts,
                                plan.partition.grid, c.tiles_n, plan.held, scalar_bytes)
                     .bytes;
  return plan;
}

template <typename S>
Results<S> kernels(const Case& c, const Numbers<S>& n) {
  const size_t state = static_cast<size_t>(c.D) * c.B * c.H, all = c.T * state;
  const float nan = std::nanf("");
  const auto floats = [&](size_t count) { return std::vector<float>(count, nan); };
  const auto scalars = [&](size_t count) {
    return std::vector<S>(count, device::from_float<S>(nan));
  };
  Results<S> r{scalars(all),
               n.h0,
               scalars(4 * all),
               std::vector<SavedGate<S>>(4 * all, device::from_float<SavedGate<S>>(nan)),
               n.c0,
               floats(all),
               floats(state),
               n.dc_n};
  for (size_t i = 0; i < state; ++i) r.dh0[i] = device::to_float(n.dh_n[i]);

  RecurrenceForward<S> f{};
  f.in = input(c, n);
  f.projected = n.projected.data();
  f.bias = n.bias.data();
  f.h0 = n.h0.data();
  f.y = r.y.data();
  f.h_n = r.h_n.data();
  f.c_n = r.c_n.data();
  f.gates = r.gates.data();
  f.cells = r.cells.data();
  if (!run(cut(c, sizeof(S), false), f)) std::abort();

  RecurrenceBackward<S> b{};
  b.in = f.in;
  b.gates = f.gates;
  b.cells = f.cells;
  b.dy = n.dy.data();
  b.dh_n = n.dh_n.data();
  b.dc_n = n.dc_n.data();
  b.detach = c.detach ? reinterpret_cast<const bool*>(n.detach.data()) : nullptr;
  b.detach_stride_d = static_cast<int64_t>(c.T) * c.B;
  b.detach_stride_t = c.B;
  b.detach_stride_b = 1;
  b.dgates = r.dgates.data();
  b.dh0 = r.dh0.data();
  b.dc0 = r.dc0.data();
  if (!run(cut(c, sizeof(S), true), b)) std::abort();
  return r;
}

struct Expected {
  std::vector<double> y, h_n, c_n, dgates, dh0, dc0;
};

// One sample in one direction; the order of the header of forward.cuh and backward.cuh.
template <typename S>
void expect_sample(const Case& c, const Numbers<S>& n, int d, int b, Expected& x) {
  const int T = c.T, B = c.B, H = c.H;
  const auto weight = [&](int row, int k) {
    return static_cast<double>(device::to_float(n.weight[(d * 4 * H + row) * H + k]));
  };
  const size_t first = (static_cast<size_t>(d) * B + b) * H;  // of the states
  const int length = c.lengths ? static_cast<int>(n.lengths[b]) : T;
  const auto time = [&](int s) { return c.reverse != (d == 1) ? length - 1 - s : s; };
  const auto row = [&](int s) { return (static_cast<size_t>(time(s)) * B + b) * c.D + d; };
  const auto mask_at = [&](int s) { return (static_cast<size_t>(d) * T + time(s)) * B + b; };
  std::vector<std::vector<double>> hs(length + 1), cs(length + 1), gates(length);
  hs[0].resize(H);
  cs[0].resize(H);
  for (int k = 0; k < H; ++k) {
    hs[0][k] = device::to_float(n.h0[first + k]);
    cs[0][k] = n.c0[first + k];
  }
  const auto is_reset = [&](int s) { return c.reset && n.reset[mask_at(s)]; };
  for (int s = 0; s < length; ++s) {
    const double keep = is_reset(s) ? 0 : 1;
    gates[s].resize(4 * H);
    hs[s + 1].resize(H);
    cs[s + 1].resize(H);
    for (int r = 0; r < 4 * H; ++r) {
      double a = n.projected[row(s) * 4 * H + r] + n.bias[d * 4 * H + r];
      for (int k = 0; k < H; ++k) a += keep * weight(r, k) * hs[s][k];
      gates[s][r] = r / H == 2 ? std::tanh(a) : 1 / (1 + std::exp(-a));
    }
    const double* g = gates[s].data();
    for (int k = 0; k < H; ++k) {
      cs[s + 1][k] = g[H + k] * keep * cs[s][k] + g[k] * g[2 * H + k];
      hs[s + 1][k] = g[3 * H + k] * std::tanh(cs[s + 1][k]);
      x.y[row(s) * H + k] = hs[s + 1][k];
    }
  }
  std::vector<double> dh(H), dc(H);
  for (int k = 0; k < H; ++k) {
    x.h_n[first + k] = hs[length][k];
    x.c_n[first + k] = cs[length][k];
    dh[k] = device::to_float(n.dh_n[first + k]);
    dc[k] = n.dc_n[first + k];
  }
  for (int s = length - 1; s >= 0; --s) {
    const double keep = is_reset(s) ? 0 : 1;
    const bool flows = keep != 0 && !(c.detach && n.detach[mask_at(s)]);
    double* da = x.dgates.data() + row(s) * 4 * H;
    for (int k = 0; k < H; ++k) {
      const double i = gates[s][k], f = gates[s][H + k], g = gates[s][2 * H + k],
                   o = gates[s][3 * H + k], tanh_c = std::tanh(cs[s + 1][k]);
      const double e = dh[k] + device::to_float(n.dy[row(s) * H + k]);
      dc[k] += e * o * (1 - tanh_c * tanh_c);
      da[k] = dc[k] * g * i * (1 - i);
      da[H + k] = dc[k] * keep * cs[s][k] * f * (1 - f);
      da[2 * H + k] = dc[k] * i * (1 - g * g);
      da[3 * H + k] = e * tanh_c * o * (1 - o);
      dc[k] *= keep * f;
    }
    for (int k = 0; k < H; ++k) {
      dh[k] = 0;
      for (int r = 0; flows && r < 4 * H; ++r) dh[k] += da[r] * weight(r, k);
    }
  }
  for (int k = 0; k < H; ++k) {
    x.dh0[first + k] = dh[k];
    x.dc0[first + k] = dc[k];
  }
}

template <typename S>
Expected expect(const Case& c, const Numbers<S>& n) {
  const size_t state = static_cast<size_t>(c.D) * c.B * c.H, all = c.T * state;
  Expected x{std::vector<double>(all),     std::vector<double>(state), std::vector<double>(state),
             std::vector<double>(4 * all), std::vector<double>(state), std::vector<double>(state)};
  for (int d = 0; d < c.D; ++d) {
    for (int b = 0; b < c.B; ++b) expect_sample(c, n, d, b, x);
  }
  return x;
}

template <typename V>
bool same(const char* name, const std::vector<V>& found, const std::vector<double>& wanted,
          double tolerance) {
  double scale = 1, worst = 0;
  for (const double w : wanted) scale = std::fmax(scale, std::fabs(w));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::fabs(device::to_float(found[i]) - wanted[i]) / scale;
    worst = error <= worst ? worst : error;  // keeps NaN
  }
  if (worst <= tolerance) return true;
  std::printf("%s: relative error %g, allowed %g\n", name, worst, tolerance);
  return false;
}

template <typename S>
bool check(const Case& c, double tolerance) {
  const Numbers<S> numbers = draw<S>(c);
  const Results<S> found = kernels(c, numbers);
  const Expected wanted = expect(c, numbers);
  bool good = true;
  good &= same("y", found.y, wanted.y, tolerance);
  good &= same("h_n", found.h_n, wanted.h_n, tolerance);
  good &= same("c_n", found.c_n, wanted.c_n, tolerance);
  good &= same("dgates", found.dgates, wanted.dgates, tolerance);
  good &= same("dh0", found.dh0, wanted.dh0, tolerance);
  good &= same("dc0", found.dc0, wanted.dc0, tolerance);
  if (!good) {
    std::printf("  in tier %d, T %d, B %d, D %d, H %d, %zu bytes\n", static_cast<int>(c.tier), c.T,
                c.B, c.D, c.H, sizeof(S));
  }
  return good;
}

}  // namespace

int main(int count, char** words) {
  int only = -1, index = 0;
  if (count == 3) {
    device::dropped = static_cast<device::Site>(std::atoi(words[1]));
    only = std::atoi(words[2]);
  }
  bool good = true;
  for (const Case& c : kCases) {
    if (only >= 0 && only != index++) continue;
    good &= check<float>(c, 1e-5);
    good &= check<device::BFloat16>(c, 3e-2);
  }
  std::printf("%s\n", good ? "equal" : "different");
  return good ? 0 : 1;
}
