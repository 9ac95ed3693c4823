// The order of work of persistent blocks (csrc/cuda/flash/sm90/schedule.h).
#include "cuda/flash/sm90/maps.h"
#include "cuda/flash/sm90/schedule.h"
#include "cuda/launch.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

constexpr int kBlock = 128;

// order[ticket] = id of the piece, visits[id] counts.
__global__ void visit(const __grid_constant__ FlashProblem p,
                      const __grid_constant__ Sm90Schedule schedule, uint32_t* ticket,
                      uint32_t* order, uint32_t* visits) {
  schedule.each(p, kBlock, [&](const RowWork& w) {
    if (threadIdx.x != 0) return;
    const int pair = w.seq.batch * schedule.grid.heads + w.rows.first_head / schedule.grid.pack;
    const auto id =
        static_cast<uint32_t>(pair * schedule.grid.tiles + w.rows.first / schedule.rows);
    order[ptx::fetch_add_global(ticket, 1)] = id;
    ptx::fetch_add_global(visits + id, 1);
  });
}

FlashProblem problem(int batch, int rows, int heads) {
  FlashProblem p;
  p.batch = batch;
  p.seqlen_q = p.seqlen_k = rows;
  p.heads_q = p.heads_k = heads;
  p.head_dim = p.v_head_dim = 64;
  return p;
}

std::vector<uint32_t> run(const FlashProblem& p, const Sm90Schedule& schedule, unsigned blocks,
                          std::vector<uint32_t>& visits) {
  uint32_t ticket = 0;
  std::vector<uint32_t> order(schedule.work);
  visits.assign(schedule.work, 0);
  ATTNFORGE_LAUNCH(visit, dim3(blocks), dim3(32), 0, nullptr, p, schedule, &ticket, order.data(),
                   visits.data());
  order.resize(ticket);
  return order;
}

EMULATOR_TEST(schedule_visits_every_piece_once) {
  const FlashProblem p = problem(3, 500, 5);  // 15 pairs of 4 tiles
  for (const int section : {1, 2, 4, 7, 15}) {
    for (const unsigned blocks : {1u, 2u, 7u, 60u}) {
      auto schedule = Sm90Schedule::of(p, kBlock, 1);
      REQUIRE(schedule.section == 15);
      REQUIRE(schedule.work == 60);
      schedule.section = section;
      std::vector<uint32_t> visits;
      run(p, schedule, blocks, visits);
      for (const uint32_t n : visits) REQUIRE(n == 1);
    }
  }
}

EMULATOR_TEST(schedule_goes_by_sections_and_longest_first) {
  const FlashProblem p = problem(1, 512, 6);
  auto schedule = Sm90Schedule::of(p, kBlock, 1);
  schedule.section = 4;  // pairs 0..3, then 4 and 5
  std::vector<uint32_t> visits;
  const auto order = run(p, schedule, 1, visits);
  for (size_t i = 0; i < order.size(); ++i) {
    const size_t width = i < 16 ? 4 : 2, first = i < 16 ? 0 : 4, place = i < 16 ? i : i - 16;
    REQUIRE(order[i] / 4 == first + place % width);
    REQUIRE(order[i] % 4 == 3 - place / width);
  }
}

EMULATOR_TEST(schedule_sections_fit_the_cache) {
  FlashProblem p = problem(1, 16384, 64);
  p.head_dim = p.v_head_dim = 128;  // 8 MiB of K and V per head
  REQUIRE(Sm90Schedule::of(p, kBlock, 1).section == 3);
  p.heads_k = 8;  // eight heads share them
  REQUIRE(Sm90Schedule::of(p, kBlock, 1).section == 24);
  p.seqlen_k = 1 << 20;  // one does not fit: still one group at a time
  REQUIRE(Sm90Schedule::of(p, kBlock, 1).section == 8);
}

EMULATOR_TEST(schedule_leaves_out_what_sequences_have_not) {
  FlashProblem p = problem(3, 500, 2);
  const int32_t starts[] = {0, 500, 500, 629};  // 4, 0 and 2 tiles
  p.cu_seqlens_q = p.cu_seqlens_k = starts;
  p.total_q = p.total_k = 629;
  const auto schedule = Sm90Schedule::of(p, kBlock, 1);
  std::vector<uint32_t> visits;
  const auto order = run(p, schedule, 5, visits);
  REQUIRE(order.size() == 12);
  for (uint32_t id = 0; id < visits.size(); ++id) {
    const uint32_t batch = id / 8, tile = id % 4;
    REQUIRE(visits[id] == (batch == 0 || (batch == 2 && tile < 2)));
  }
}

// Counts the rows that a tile has, by head and query.
__global__ void count_rows(const __grid_constant__ FlashProblem p,
                           const __grid_constant__ Sm90Schedule schedule, uint32_t* rows) {
  schedule.each(p, kBlock, [&](const RowWork& w) {
    for (int r = static_cast<int>(threadIdx.x); r < kBlock; r += 32) {
      if (!w.rows.exists(r)) continue;
      ptx::fetch_add_global(rows + w.rows.head(r) * p.seqlen_q + w.rows.query(r), 1);
    }
  });
}

EMULATOR_TEST(heads_that_do_not_divide_a_tile_share_it) {
  for (const int group : {3, 7, 16, 96}) {
    FlashFwdParams params;
    FlashProblem& p = params.problem = problem(1, 50, 2 * group);
    p.heads_k = 2;
    params.q.head_stride = 64;
    const Sm90Box box = q_box(params, kBlock);
    REQUIRE(box.heads == group && box.rows == kBlock / group);
    const auto schedule = Sm90Schedule::of(p, kBlock, box.heads);
    REQUIRE(schedule.rows == box.heads * box.rows);
    REQUIRE(schedule.work == 2 * ceil_div(50, box.rows));
    std::vector<uint32_t> rows(100 * group);
    ATTNFORGE_LAUNCH(count_rows, dim3(5), dim3(32), 0, nullptr, p, schedule, rows.data());
    for (const uint32_t n : rows) REQUIRE(n == 1);
  }
  FlashFwdParams params;
  params.q.head_stride = 64;
  params.problem = problem(1, 65, 7);  // rows of one head fill more than half of a tile
  params.problem.heads_k = 1;
  REQUIRE(q_box(params, kBlock).heads == 1);
  params.problem = problem(1, 5, 200);  // more heads than rows
  params.problem.heads_k = 1;
  REQUIRE(q_box(params, kBlock).heads == 1);
}

}  // namespace
}  // namespace attnforge::cuda
