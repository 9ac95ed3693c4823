// Hash tables of keys: insertion and truncation in place, a block per table. Ids of a bucket ascend
// and new keys come behind all others.
//
//   insert     a stable counting sort of the new codes: warps count runs of the rows each for
//              itself, prefix sums over buckets and warps give every warp its places, and warps go
//              over their runs once more. Equal codes of a step are found by ballots, one per bit,
//              so that no order is left to chance. Ids that are there move up by what comes before
//              them, from the last to the first
//   truncate   the ids of a bucket that stay are a prefix of it: found by bisection, added up, and
//              the table is compacted from the first to the last
//   bytes      2 per code, twice; the ids of the tables that change. Codes of a table lie 2 L bytes
//              apart: neighbouring tables, which run at the same time, share the sectors in L2
//
// Warps of a block are as many as have room for 16-bit counts: 16 up to 11 bits, one for 15.
#include "cuda/launch.h"
#include "cuda/ptx/math.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/sequence.h"

namespace attnforge::cuda {
namespace {

constexpr int kMostWarps = 16;
constexpr int kTruncateThreads = 256;

AF_DEVICE int threads() {
  return static_cast<int>(blockDim.x);
}
AF_DEVICE int rank() {
  return static_cast<int>(threadIdx.x);
}

// A table of this block.
struct Table {
  int32_t* starts;
  uint16_t* ids;
  int batch, segment, number;  // number: among the tables
  int64_t unit;                // sequence and KV head
  int size, buckets;           // size: of a segment

  AF_DEVICE static Table of(const LshTables& t) {
    Table own;
    int64_t id = blockIdx.x;
    own.size = static_cast<int>(t.segment), own.buckets = 1 << t.bits;
    own.starts = t.starts + id * (own.buckets + 1);
    own.ids = t.ids + id * t.segment;
    own.number = static_cast<int>(id % t.tables);
    id /= t.tables;
    own.segment = static_cast<int>(id % t.segments);
    own.unit = id / t.segments;
    own.batch = static_cast<int>(own.unit / t.heads);
    return own;
  }
  AF_DEVICE int start(int bucket) const { return at_least(0, at_most(starts[bucket], size)); }

  // The bucket of a place: the last one that does not begin behind it.
  AF_DEVICE int bucket_of(int place) const {
    int low = 0, high = buckets;  // it begins at or before the place; it does not
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (start(middle) <= place ? low : high) = middle;
    }
    return low;
  }
  // Of the ids in [begin, end), which ascend, those below `keep`.
  AF_DEVICE int below(int begin, int end, int keep) const {
    int low = begin, high = end;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ids[middle] < keep) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low - begin;
  }
};

// Rows that go into a table: local keys [lo, hi), the first of them in row `row`.
struct NewKeys {
  int lo, hi;
  int64_t row;

  AF_DEVICE static NewKeys of(const LshInsertParams& p, const Table& table, int64_t begin) {
    const int64_t first = at_least(0, p.first[table.batch]);
    const int64_t count = at_least<int64_t>(0, at_most<int64_t>(p.count[table.batch], p.rows));
    const int64_t key0 = int64_t{table.segment} * table.size;
    const int64_t lo = at_least(first + begin, key0);
    const int64_t end = first + at_most(count, begin + kInsertRows);
    const int64_t hi = at_most(end, key0 + table.size);
    if (lo >= hi) return {0, 0, 0};
    return {static_cast<int>(lo - key0), static_cast<int>(hi - key0), lo - first};
  }
};

// Which lanes of the warp have this lane's code; none for a lane that does not count.
AF_DEVICE uint32_t same_code(uint32_t code, bool counts, int bits) {
  uint32_t peers = ptx::ballot(counts);
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = code >> bit & 1;
    const uint32_t all = ptx::ballot(set);
    peers &= set ? all : ~all;
  }
  return counts ? peers : 0;
}

__global__ void __launch_bounds__(32 * kMostWarps)
    lsh_insert_kernel(const __grid_constant__ LshInsertParams p, int64_t begin) {
  const Table table = Table::of(p.tables);
  const NewKeys keys = NewKeys::of(p, table, begin);
  if (keys.lo >= keys.hi) return;
  const int warps = threads() / 32, buckets = table.buckets;
  const int bits = static_cast<int>(p.tables.bits), lane = static_cast<int>(ptx::lane_id());
  const uint16_t* codes =
      p.codes + (table.unit * p.rows + keys.row) * p.tables.tables + table.number;
  const uint32_t shared = ptx::dynamic_shared_memory();
  // 16-bit numbers: how many each warp has of a bucket; then how many new keys come before those.
  const auto count_at = [&](int warp, int bucket) {
    return shared + 2 * static_cast<uint32_t>(warp * buckets + bucket);
  };
  const auto load = [](uint32_t at) { return int{ptx::load_shared<uint16_t>(at)}; };
  const auto store = [](uint32_t at, int n) { ptx::store_shared(at, static_cast<uint16_t>(n)); };
  const Block block = {warps, (count_at(warps, 0) + 7) / 8 * 8};

  // f(local key, code, peers) of the run of this warp, 32 rows at a time.
  const int run = ceil_div(ceil_div(keys.hi - keys.lo, warps), 32) * 32;
  const int lo = keys.lo + warp_id() * run, hi = at_most(lo + run, keys.hi);
  const auto each = [&](const auto& f) {
    for (int key = lo + lane; key - lane < hi; key += 32) {
      const bool real = key < hi;
      const uint32_t code = real ? codes[(key - keys.lo) * p.tables.tables] & (buckets - 1u) : 0;
      f(key, static_cast<int>(code), same_code(code, real, bits));
    }
  };
  for (int n = rank(); n < warps * buckets; n += threads()) store(count_at(0, n), 0);
  ptx::sync_threads();
  // One more of a code for each of its peers, by the first of them.
  const auto add = [&](int code, uint32_t peers) {
    ptx::sync_warp();  // of what was read
    if (peers != 0 && ptx::popcount(peers & ((1u << lane) - 1)) == 0) {
      const uint32_t at = count_at(warp_id(), code);
      store(at, load(at) + ptx::popcount(peers));
    }
    ptx::sync_warp();
  };
  each([&](int, int code, uint32_t peers) { add(code, peers); });
  ptx::sync_threads();
  int total = 0;  // of the buckets before this step
  for (int first = 0; first < buckets; first += threads()) {
    const int bucket = first + rank();
    int sum = 0, all;
    const auto each_warp = [&](const auto& f) {
      for (int w = 0; w < warps && bucket < buckets; ++w) f(count_at(w, bucket));
    };
    each_warp([&](uint32_t at) { sum += load(at); });
    int before = total + block.sum_before(sum, all);
    each_warp([&](uint32_t at) {
      const int own = load(at);
      store(at, before);
      before += own;
    });
    total += all;
  }
  ptx::sync_threads();

  for (int end = table.start(buckets); end > 0; end -= threads()) {
    const int place = end - 1 - rank();
    int to = place;
    uint16_t id = 0;
    if (place >= 0) {
      to += load(count_at(0, table.bucket_of(place)));
      id = table.ids[place];
    }
    ptx::sync_threads();  // all of the step is read
    if (to != place && to < table.size) table.ids[to] = id;
  }
  ptx::sync_threads();
  each([&](int key, int code, uint32_t peers) {
    if (peers != 0) {
      const int to = table.start(code + 1) + load(count_at(warp_id(), code)) +
                     ptx::popcount(peers & ((1u << lane) - 1));
      if (to < table.size) table.ids[to] = static_cast<uint16_t>(key);
    }
    add(code, peers);
  });
  ptx::sync_threads();
  // The last warp has come to what is before the next bucket.
  for (int bucket = rank(); bucket < buckets; bucket += threads()) {
    const int end = table.start(bucket + 1) + load(count_at(warps - 1, bucket));
    table.starts[bucket + 1] = at_most(end, table.size);
  }
}

__global__ void __launch_bounds__(kTruncateThreads)
    lsh_truncate_kernel(const __grid_constant__ LshTruncateParams p) {
  const Table table = Table::of(p.tables);
  const int64_t length = at_least(0, p.length[table.batch]);
  const int64_t left = length - int64_t{table.segment} * table.size;
  if (left >= table.size) return;  // all of them stay
  const int keep = static_cast<int>(at_least<int64_t>(0, left));
  const Block block = {kTruncateThreads / 32, ptx::dynamic_shared_memory()};
  const int count = table.start(table.buckets);
  int total = 0, all;
  for (int first = 0; first < table.buckets; first += kTruncateThreads) {
    const int bucket = first + rank();
    int stay = 0;
    if (bucket < table.buckets) {
      const int begin = table.start(bucket);
      stay = table.below(begin, at_least(begin, table.start(bucket + 1)), keep);
    }
    const int before = total + block.sum_before(stay, all);  // the old starts are read
    if (bucket < table.buckets) table.starts[bucket] = before;
    total += all;
  }
  ptx::sync_threads();
  if (rank() == 0) table.starts[table.buckets] = total;
  int kept = 0;
  for (int first = 0; first < count; first += kTruncateThreads) {
    const int place = first + rank();
    const uint16_t id = place < count ? table.ids[place] : 0;
    const int stays = place < count && id < keep;
    const int to = kept + block.sum_before(stays, all);  // all of the step is read
    if (stays != 0) table.ids[to] = id;
    kept += all;
  }
}

unsigned blocks_of(const LshTables& t) {
  return static_cast<unsigned>(t.batch * t.heads * t.segments * t.tables);
}

}  // namespace

int lsh_insert(const LshInsertParams& params, int64_t begin, void* stream) {
  const LshTables& t = params.tables;
  if (blocks_of(t) == 0) return 0;
  const int64_t buckets = int64_t{1} << t.bits;
  const int64_t room = kInsertRows / buckets;
  const auto warps = static_cast<unsigned>(room < kMostWarps ? room : kMostWarps);
  const auto bytes = static_cast<uint32_t>(2 * warps * buckets + 8 + 8 * warps);
  return ATTNFORGE_LAUNCH((lsh_insert_kernel), dim3(blocks_of(t)), dim3(32 * warps), bytes, stream,
                          params, begin);
}

int lsh_truncate(const LshTruncateParams& params, void* stream) {
  if (blocks_of(params.tables) == 0) return 0;
  return ATTNFORGE_LAUNCH((lsh_truncate_kernel), dim3(blocks_of(params.tables)),
                          dim3(kTruncateThreads), kTruncateThreads / 4, stream, params);
}

}  // namespace attnforge::cuda
