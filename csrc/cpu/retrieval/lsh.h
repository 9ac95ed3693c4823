// Hash tables of keys as kernels walk them: see LshTables.
#pragma once

#include "attnforge/retrieval.h"
#include "cpu/micro/gemm.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct Table {
  int32_t* starts;
  uint16_t* ids;
};

AF_INLINE int64_t buckets_of(const LshTables& t) {
  return int64_t{1} << t.bits;
}

AF_INLINE Table table_of(const LshTables& t, int64_t unit, int64_t segment, int64_t table) {
  const int64_t at = (unit * t.segments + segment) * t.tables + table;
  return {t.starts + at * (buckets_of(t) + 1), t.ids + at * t.segment};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
