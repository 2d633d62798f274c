// The LSTM's GPU kernels on the CPU under a sanitizer: every tier and every barrier, without Python,
// which sanitizers do not support. test_cuda_on_cpu.py tests the numbers.
//
//     main [SITE CASE]    leaves out barrier SITE (its number in device.cuh) and runs one case
//
// Exits 0, or as the sanitizer does that finds something.
#include <cstdlib>

#include "cases.h"

using namespace throughtime;

namespace {

constexpr Case kCases[] = {
    // One block, warps that share an inner dimension, more jobs than warps.
    {Tier::kResident, 4, 9, 1, 72, 1, 0, 1, 2, 3, 9, true, true, true, false},
    {Tier::kResident, 4, 3, 2, 40, 2, 0, 1, 1, 1, 6, true, false, true, true},
    // Clusters of two and four blocks, the last of them partly empty. Six steps: each of two mbarriers
    // and buffers takes two rounds and more.
    {Tier::kResident, 6, 5, 1, 40, 1, 0, 2, 2, 1, 3, false, true, true, true},
    {Tier::kResident, 6, 11, 1, 56, 2, 0, 4, 1, 2, 2, true, true, false, false},
    // Blocks of a grid, in both directions.
    {Tier::kGrid, 4, 9, 2, 40, 1, 0, 3, 2, 2, 2, true, true, true, false},
    {Tier::kGrid, 6, 3, 1, 24, 1, 0, 3, 1, 1, 1, false, false, false, true},
    {Tier::kStepwise, 3, 3, 2, 8, 0, 0, 1, 1, 1, 1, true, true, true, true},
};

}  // namespace

int main(int count, char** words) {
  int only = -1, index = 0;
  if (count == 3) {
    device::dropped = static_cast<device::Site>(std::atoi(words[1]));
    only = std::atoi(words[2]);
  }
  const auto nothing = [](bool) {};
  for (const Case& c : kCases) {
    if (only >= 0 && only != index++) continue;
    run_both<float>(c, nothing);
    run_both<device::BFloat16>(c, nothing);
  }
}
