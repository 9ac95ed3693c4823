// Keys that share at least min_hits buckets with a query, in ascending order.
//
//   mark       a block has a segment of keys of a query head, and two bits per key in shared
//   memory:
//              hit, and hit again. A warp goes over the buckets of every sixteenth table. Bits that
//              are set by atomics are the same in any order, and 65,536 keys take 16 KiB
//   list       a block per segment again: the bits of the segment become ids, behind those of the
//              segments before it, by prefix sums
//   bytes      about L n / 2^bits ids of 2 bytes, which lie anywhere, and a bit per key
//
// Source: MagicPIG (Chen et al., 2024) for what is counted; the code is our own.
#include "cuda/launch.h"
#include "cuda/ptx/math.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/sequence.h"

namespace attnforge::cuda {
namespace {

constexpr int kMarkWarps = 16, kListWarps = 8;

// A segment of the keys of a query head.
struct Part {
  int batch, head, segment;
  int64_t row, number;  // of the head among all, and of the segment
  int lo, hi;           // local keys that may be sampled
  int words;            // of bits

  AF_DEVICE static Part of(const LshRetrieveParams& params) {
    const LshTables& t = params.tables;
    const int heads = static_cast<int>(params.problem.heads_q);
    Part part;
    part.number = blockIdx.x;
    part.segment = static_cast<int>(part.number % t.segments);
    part.row = part.number / t.segments;
    part.head = static_cast<int>(part.row % heads);
    part.batch = static_cast<int>(part.row / heads);
    const int size = static_cast<int>(t.segment), key = part.segment * size;
    const int end = at_most(params.end[part.batch], static_cast<int>(params.problem.seqlen_k));
    part.lo = at_most(size, at_least(0, params.begin[part.batch] - key));
    part.hi = at_least(part.lo, at_most(size, end - key));
    part.words = (size + 31) / 32;
    return part;
  }
};

__global__ void __launch_bounds__(32 * kMarkWarps)
    lsh_mark_kernel(const __grid_constant__ LshRetrieveParams params,
                    const __grid_constant__ LshHits hits) {
  constexpr int kThreads = 32 * kMarkWarps;
  const LshTables& t = params.tables;
  const Part part = Part::of(params);
  if (part.lo >= part.hi) {
    if (threadIdx.x == 0) hits.counts[part.number] = 0;
    return;
  }
  const int tables = static_cast<int>(t.tables), segment = static_cast<int>(t.segment);
  const int group = static_cast<int>(params.problem.heads_q / t.heads);
  const int buckets = 1 << t.bits, lane = static_cast<int>(ptx::lane_id());
  const int64_t first =
      ((part.batch * t.heads + part.head / group) * t.segments + part.segment) * t.tables;
  const uint16_t* codes = params.codes + part.row * t.tables;
  const uint32_t once = ptx::dynamic_shared_memory();
  const uint32_t twice = once + 4 * static_cast<uint32_t>(part.words);
  for (int n = static_cast<int>(threadIdx.x); n < 2 * part.words; n += kThreads) {
    ptx::store_shared(once + 4 * n, uint32_t{0});
  }
  ptx::sync_threads();
  for (int base = 0; base < tables; base += kThreads) {
    // Where the buckets of 32 tables of the warp lie is asked for at once.
    int begin = 0, end = 0;
    const int own = base + kMarkWarps * lane + warp_id();
    if (own < tables) {
      const int32_t* starts =
          t.starts + (first + own) * (buckets + 1) + (codes[own] & (buckets - 1));
      begin = at_least(0, starts[0]), end = at_most(segment, starts[1]);
    }
    for (int n = 0; n < 32 && base + kMarkWarps * n + warp_id() < tables; ++n) {
      const uint16_t* ids = t.ids + (first + base + kMarkWarps * n + warp_id()) * segment;
      const int last = ptx::shuffle_from(end, n);
      for (int i = ptx::shuffle_from(begin, n) + lane; i < last; i += 32) {
        const int key = ids[i];
        if (key < part.lo || key >= part.hi) continue;
        const uint32_t bit = 1u << key % 32;
        const uint32_t at = 4 * static_cast<uint32_t>(key / 32);
        if (ptx::fetch_or_shared(once + at, bit) & bit) ptx::fetch_or_shared(twice + at, bit);
      }
    }
  }
  ptx::sync_threads();
  const uint32_t enough = params.min_hits > 1 ? twice : once;
  uint32_t* to = hits.bits + part.number * part.words;
  int count = 0;
  for (int n = static_cast<int>(threadIdx.x); n < part.words; n += kThreads) {
    const auto word = ptx::load_shared<uint32_t>(enough + 4 * n);
    to[n] = word;
    count += ptx::popcount(word);
  }
  const Block block = {kMarkWarps, twice + 4 * static_cast<uint32_t>(part.words)};
  count = block.over(count, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) hits.counts[part.number] = count;
}

__global__ void __launch_bounds__(32 * kListWarps)
    lsh_list_kernel(const __grid_constant__ LshRetrieveParams params,
                    const __grid_constant__ LshHits hits) {
  constexpr int kThreads = 32 * kListWarps;
  const Part part = Part::of(params);
  const int segments = static_cast<int>(params.tables.segments);
  const int32_t* counts = hits.counts + part.row * segments;
  const uint32_t* bits = hits.bits + part.number * part.words;
  const Block block = {kListWarps, ptx::dynamic_shared_memory()};
  int found = 0;  // before this step
  for (int s = 0; s < part.segment; ++s) found += counts[s];
  const int own = counts[part.segment];
  if (part.segment == segments - 1 && threadIdx.x == 0) params.lens[part.row] = found + own;
  if (own == 0) return;
  int32_t* ids = params.ids + part.row * params.slots;
  for (int start = 0; start < part.words; start += kThreads) {
    const int n = start + static_cast<int>(threadIdx.x);
    const uint32_t word = n < part.words ? bits[n] : 0;
    int all, place = found + block.sum_before(ptx::popcount(word), all);
    const int key = part.segment * static_cast<int>(params.tables.segment) + 32 * n;
    for (uint32_t rest = word; rest != 0; rest &= rest - 1) {
      ids[place++] = key + ptx::popcount((rest & (0u - rest)) - 1);
    }
    found += all;
  }
}

}  // namespace

int lsh_collect(const LshRetrieveParams& params, const LshHits& hits, void* stream) {
  const LshTables& t = params.tables;
  const auto blocks =
      static_cast<unsigned>(params.problem.batch * params.problem.heads_q * t.segments);
  if (blocks == 0) return 0;
  const int64_t words = (t.segment + 31) / 32;
  const auto bytes = static_cast<uint32_t>(8 * words + 8 * kMarkWarps);
  const int error = ATTNFORGE_LAUNCH((lsh_mark_kernel), dim3(blocks), dim3(32 * kMarkWarps), bytes,
                                     stream, params, hits);
  if (error != 0) return error;
  return ATTNFORGE_LAUNCH((lsh_list_kernel), dim3(blocks), dim3(32 * kListWarps), 8 * kListWarps,
                          stream, params, hits);
}

}  // namespace attnforge::cuda
