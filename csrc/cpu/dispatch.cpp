// Chooses the ISA level: one function table per level, the best that this CPU runs unless told
// otherwise.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

#include "cpu/tile_kernels.h"

namespace attnforge::cpu {

// The build defines ATTNFORGE_ISA_LIST for what it compiled, in order of preference, worst first:
// WHOLE(<level>), and TILES(<level>, <level below>) for one with few kernels of its own.
#define WHOLE(ISA) ATTNFORGE_DECLARE_ISA(ISA)
#define TILES(ISA, BELOW) ATTNFORGE_DECLARE_TILES(ISA, BELOW)
ATTNFORGE_ISA_LIST
#undef WHOLE
#undef TILES

// The table of each level, in the order of its fields.
#define ATTNFORGE_SIZED_ENTRY(NAME, PARAMS) NAME##_workspace, NAME,
#define ATTNFORGE_PLAIN_ENTRY(NAME, PARAMS) NAME,
#define WHOLE(ISA)                                                                         \
  namespace ISA {                                                                          \
  const KernelTable table = {#ISA,                                                         \
                             ATTNFORGE_SIZED_KERNELS(ATTNFORGE_SIZED_ENTRY)                \
                                 ATTNFORGE_PLAIN_KERNELS(ATTNFORGE_PLAIN_ENTRY) probe_fma, \
                             probe_read};                                                  \
  }
#define TILES(ISA, BELOW) WHOLE(ISA)
ATTNFORGE_ISA_LIST
#undef WHOLE

namespace {

// Whether the CPU has tiles of bf16 and of bytes and the system lets this process use them: Linux
// keeps their 8 KiB per thread for those that have asked. The answer holds for all threads.
bool tiles_run_here() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    if ((edx & kBf16) == 0 || (edx & kTile) == 0 || (edx & kInt8) == 0) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & 1u << 5) == 0) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

bool runs_here(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512cd");
  if (!std::strcmp(isa, "amx")) return avx512 && tiles_run_here();
  if (!std::strcmp(isa, "avx512")) return avx512;
  return std::strcmp(isa, "baseline") ? avx2 : __builtin_cpu_supports("sse4.2");
#else
  return !std::strcmp(isa, "baseline");
#endif
}

const KernelTable* const kTables[] = {
#define WHOLE(ISA) &ISA::table,
    ATTNFORGE_ISA_LIST
#undef WHOLE
#undef TILES
};

const KernelTable* best() {
  const KernelTable* choice = kTables[0];
  for (const KernelTable* table : kTables) {
    if (runs_here(table->isa)) choice = table;
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
    for (const KernelTable* table : kTables) {
      if (!runs_here(table->isa)) continue;
      if (names.text[0]) std::strcat(names.text, ",");
      std::strcat(names.text, table->isa);
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
  for (const KernelTable* table : kTables) {
    if (!std::strcmp(table->isa, name) && runs_here(name)) {
      in_force = table;
      return true;
    }
  }
  return false;
}

}  // namespace attnforge::cpu
