// How a team takes the blocks of a sequence through three stages, of which only the second needs what it
// left of the block before.
//
// So the first member takes a group of blocks through the second, the others take the next group
// through the first and the group before through the third, and the first helps them when it has done;
// then all meet.
#pragma once

#include "common/cpu/team.h"

namespace throughtime {
namespace {

class Stages {
 public:
  // So many blocks are under way at once.
  TT_INLINE static int64_t slots(int64_t members) { return members > 1 ? 3 * kGroup : 1; }

  // By one member, before all meet.
  TT_INLINE void begin(int64_t blocks) {
    blocks_ = blocks;
    jobs_[0] = jobs_[1] = 0;
  }

  // By all members: calls the stages with the numbers of blocks, the second by the first member only.
  template <typename First, typename Second, typename Third>
  void walk(const Member& member, int64_t members, const First& first, const Second& second,
            const Third& third) {
    if (members == 1) {
      for (int64_t block = 0; block < blocks_; ++block) {
        first(block);
        second(block);
        third(block);
      }
      return;
    }
    const int64_t groups = divide_up(blocks_, kGroup);
    for (int64_t group = -1; group <= groups; ++group) {
      if (member.begin == 0) {
        jobs_[group & 1] = 0;  // of the next round: this one's are those of group + 1
        each(group, 0, kGroup, second);
      }
      constexpr int64_t kPieces = kGroup / kPiece;
      for (;;) {
        const int64_t job = __atomic_fetch_add(&jobs_[(group + 1) & 1], 1, __ATOMIC_RELAXED);
        if (job >= kPieces + kGroup) break;
        if (job < kPieces)
          each(group + 1, job * kPiece, kPiece, first);
        else
          each(group - 1, job - kPieces, 1, third);
      }
      member.wait();
    }
  }

 private:
  static constexpr int64_t kGroup = 8;  // blocks between two barriers
  static constexpr int64_t kPiece =
      4;  // blocks that one member takes through the first stage at once

  // Calls f(block) for `count` blocks of a group, as far as they are there.
  template <typename F>
  TT_INLINE void each(int64_t group, int64_t from, int64_t count, const F& f) const {
    const int64_t begin = group * kGroup + from;
    for (int64_t block = most(0, begin); block < least(begin + count, blocks_); ++block) f(block);
  }

  int64_t blocks_;
  alignas(64) int64_t jobs_[2];  // taken, of this round and of the next
};

}  // namespace
}  // namespace throughtime
