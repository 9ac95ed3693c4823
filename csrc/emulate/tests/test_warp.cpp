// Shuffles, votes and elections.
#include "cuda/ptx/warp.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using testing::expect_report;

__global__ void shuffle_all(uint32_t* out) {
  const uint32_t lane = ptx::lane_id();
  out[lane] = ptx::shuffle_xor(lane, 5);
  out[32 + lane] = ptx::shuffle_from(lane, lane * 3 + 40);
  out[64 + lane] = ptx::shuffle_up(lane, 3);
  out[96 + lane] = ptx::shuffle_down(lane, 3);
  const float sign = ptx::shuffle_xor(lane == 4 ? -1.0f : 1.0f, 16);
  out[128 + lane] = sign < 0;
}

EMULATOR_TEST(shuffles) {
  std::vector<uint32_t> out(160);
  ATTNFORGE_LAUNCH(shuffle_all, dim3(1), dim3(32), 0, nullptr, out.data());
  for (uint32_t lane = 0; lane < 32; ++lane) {
    REQUIRE(out[lane] == (lane ^ 5));
    REQUIRE(out[32 + lane] == (lane * 3 + 40) % 32);
    REQUIRE(out[64 + lane] == (lane < 3 ? lane : lane - 3));
    REQUIRE(out[96 + lane] == (lane > 28 ? lane : lane + 3));
    REQUIRE(out[128 + lane] == (lane == 20));
  }
}

// The two halves of a warp go their own ways, each with its mask.
__global__ void vote(uint32_t* out) {
  const uint32_t lane = ptx::lane_id();
  const bool low = lane < 16;
  const uint32_t mask = low ? 0xffffu : 0xffff0000u;
  if (low) {
    out[lane] = ptx::ballot(lane % 2 == 0, mask);
  } else {
    out[lane] = ptx::ballot(lane % 2 == 1, mask);
  }
  out[32 + lane] = ptx::any(lane == 3, mask) * 2 + ptx::all(lane < 20, mask);
  out[64 + lane] = ptx::elect_one();
}

EMULATOR_TEST(votes) {
  std::vector<uint32_t> out(96);
  ATTNFORGE_LAUNCH(vote, dim3(1), dim3(32), 0, nullptr, out.data());
  uint32_t elected = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    REQUIRE(out[lane] == (lane < 16 ? 0x5555u : 0xaaaa0000u));
    REQUIRE(out[32 + lane] == (lane < 16 ? 3u : 0u));
    elected += out[64 + lane];
  }
  REQUIRE(elected == 1);
}

__global__ void read_outside_the_mask(uint32_t* out) {
  const uint32_t lane = ptx::lane_id();
  if (lane < 8) out[lane] = ptx::shuffle_from(lane, 9, 0xff);
}

__global__ void not_in_its_mask(uint32_t* out) {
  out[threadIdx.x] = ptx::shuffle_xor(threadIdx.x, 1, 0xffff);
}

__global__ void one_lane_leaves(uint32_t* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = ptx::shuffle_xor(threadIdx.x, 1);
}

__global__ void two_instructions(uint32_t* out) {
  if (threadIdx.x < 5) {
    out[threadIdx.x] = ptx::ballot(true);
  } else {
    out[threadIdx.x] = ptx::shuffle_xor(threadIdx.x, 1);
  }
}

EMULATOR_TEST(warp_divergence_is_reported) {
  std::vector<uint32_t> out(32);
  const auto report = [&](void (*kernel)(uint32_t*), const std::vector<std::string>& parts) {
    expect_report([&] { ATTNFORGE_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, out.data()); },
                  parts);
  };
  report(read_outside_the_mask, {"shuffle_from: lane", "reads lane 9, which is not in the mask"});
  report(not_in_its_mask, {"the lane is not in its own mask"});
  report(one_lane_leaves, {"left the kernel", "shuffle_xor"});
  report(two_instructions, {"warp divergence", "a vote", "shuffle_xor"});
}

}  // namespace
}  // namespace attnforge::emulate
