// Chooses the ISA level: one function table per level, the best that this CPU runs unless told
// otherwise.
#include <cstring>

#include "cpu/kernels.h"

namespace attnforge::cpu {

// The build defines ATTNFORGE_ISA_LIST as X(<level>) X(<level>) ... for what it compiled, in order
// of preference, worst first.
#define X(ISA) ATTNFORGE_DECLARE_ISA(ISA)
ATTNFORGE_ISA_LIST
#undef X

namespace {

bool runs_here(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (!std::strcmp(isa, "avx2") || !std::strcmp(isa, "avx512_soft")) return avx2;
  if (!std::strcmp(isa, "avx512")) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
  }
  return __builtin_cpu_supports("sse4.2");
#else
  return !std::strcmp(isa, "baseline");
#endif
}

const KernelTable kTables[] = {
#define X(ISA)                      \
  {#ISA,                            \
   ISA::flash_fwd_workspace,        \
   ISA::flash_fwd,                  \
   ISA::flash_decode_workspace,     \
   ISA::flash_decode,               \
   ISA::flash_bwd_workspace,        \
   ISA::flash_bwd,                  \
   ISA::merge_states,               \
   ISA::column_sums_workspace,      \
   ISA::column_sums,                \
   ISA::span_mass_workspace,        \
   ISA::span_mass,                  \
   ISA::span_grad_workspace,        \
   ISA::span_grad,                  \
   ISA::block_max_workspace,        \
   ISA::block_max,                  \
   ISA::row_entropy_workspace,      \
   ISA::row_entropy,                \
   ISA::topk_keys_workspace,        \
   ISA::topk_keys,                  \
   ISA::edges_workspace,            \
   ISA::edges,                      \
   ISA::linear_chunk_fwd_workspace, \
   ISA::linear_chunk_fwd,           \
   ISA::linear_chunk_bwd_workspace, \
   ISA::linear_chunk_bwd,           \
   ISA::delta_chunk_fwd_workspace,  \
   ISA::delta_chunk_fwd,            \
   ISA::delta_chunk_bwd_workspace,  \
   ISA::delta_chunk_bwd,            \
   ISA::diag_scan_bwd_workspace,    \
   ISA::diag_scan_bwd,              \
   ISA::delta_step,                 \
   ISA::diag_scan_fwd,              \
   ISA::linear_step,                \
   ISA::head_gradient,              \
   ISA::probe_fma,                  \
   ISA::probe_read},
    ATTNFORGE_ISA_LIST
#undef X
};

const KernelTable* best() {
  const KernelTable* choice = &kTables[0];
  for (const KernelTable& table : kTables) {
    if (runs_here(table.isa)) choice = &table;
  }
  return choice;
}

const KernelTable* in_force = best();

}  // namespace

const KernelTable& kernels() {
  return *in_force;
}

const char* isa_levels() {
  static const auto list = [] {
    struct {
      char text[64] = "";
    } names;
    for (const KernelTable& table : kTables) {
      if (!runs_here(table.isa)) continue;
      if (names.text[0]) std::strcat(names.text, ",");
      std::strcat(names.text, table.isa);
    }
    return names;
  }();
  return list.text;
}

bool select_isa(const char* name) {
  if (!std::strcmp(name, "auto")) {
    in_force = best();
    return true;
  }
  for (const KernelTable& table : kTables) {
    if (!std::strcmp(table.isa, name) && runs_here(name)) {
      in_force = &table;
      return true;
    }
  }
  return false;
}

}  // namespace attnforge::cpu
