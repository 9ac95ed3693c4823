// Hash tables of keys: insertion and truncation in place.
//
// Ids of a bucket ascend and new keys come behind all others, so inserting m keys moves each bucket
// once, from the last to the first, and truncating drops the ends of buckets: O(buckets + keys) per
// table, no sort and no copy. A table is one task.
#include "cpu/kernels.h"
#include "cpu/retrieval/lsh.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// Keys [key0, key1) of the segment, local; code(key) of each.
template <class Code>
AF_INLINE void insert_keys(const Table& table, int64_t buckets, int64_t key0, int64_t key1,
                           const Code& code) {
  int32_t* starts = table.starts;
  int32_t added[1 << 15];  // bits go up to 15
  for (int64_t b = 0; b < buckets; ++b) added[b] = 0;
  for (int64_t key = key0; key < key1; ++key) ++added[code(key)];
  int64_t shift = key1 - key0;
  for (int64_t b = buckets - 1; b >= 0 && shift > 0; --b) {
    const int32_t begin = starts[b], end = starts[b + 1];
    starts[b + 1] = static_cast<int32_t>(end + shift);
    shift -= added[b];
    if (shift > 0) {
      __builtin_memmove(table.ids + begin + shift, table.ids + begin,
                        (end - begin) * sizeof(uint16_t));
    }
  }
  // added becomes the place of the next new id of a bucket: at its end, less what it gets.
  for (int64_t b = 0; b < buckets; ++b) added[b] = starts[b + 1] - added[b];
  for (int64_t key = key0; key < key1; ++key) {
    table.ids[added[code(key)]++] = static_cast<uint16_t>(key);
  }
}

// Keeps the local keys below `keys`.
AF_INLINE void keep_keys(const Table& table, int64_t buckets, int64_t keys) {
  int32_t to = 0, begin = table.starts[0];
  for (int64_t b = 0; b < buckets; ++b) {
    const int32_t end = table.starts[b + 1];
    for (int32_t i = begin; i < end && table.ids[i] < keys; ++i) table.ids[to++] = table.ids[i];
    begin = end;
    table.starts[b + 1] = to;
  }
}

}  // namespace

void lsh_insert(const LshInsertParams& params, const Workers& workers) {
  const LshTables& t = params.tables;
  parallel_tasks(workers, t.batch * t.heads * t.tables, [&](int64_t task, int64_t) {
    const int64_t table = task % t.tables, unit = task / t.tables, batch = unit / t.heads;
    const int64_t first = max64(0, params.first[batch]);
    const int64_t count = max64(0, min64(params.count[batch], params.rows));
    const int64_t end = min64(first + count, t.segments * t.segment);
    const uint16_t* codes = params.codes + unit * params.rows * t.tables + table;
    const uint16_t mask = static_cast<uint16_t>(buckets_of(t) - 1);
    for (int64_t key = first; key < end;) {
      const int64_t segment = key / t.segment, key0 = segment * t.segment;
      const int64_t stop = min64(end, key0 + t.segment);
      insert_keys(table_of(t, unit, segment, table), buckets_of(t), key - key0, stop - key0,
                  [&](int64_t local) { return codes[(key0 + local - first) * t.tables] & mask; });
      key = stop;
    }
  });
}

void lsh_truncate(const LshTruncateParams& params, const Workers& workers) {
  const LshTables& t = params.tables;
  parallel_tasks(workers, t.batch * t.heads * t.tables, [&](int64_t task, int64_t) {
    const int64_t table = task % t.tables, unit = task / t.tables;
    const int64_t length = max64(0, params.length[unit / t.heads]);
    for (int64_t s = 0; s < t.segments; ++s) {
      const int64_t keys = max64(0, min64(length - s * t.segment, t.segment));
      keep_keys(table_of(t, unit, s, table), buckets_of(t), keys);
    }
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
