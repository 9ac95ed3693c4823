// attnforge._host: host-side facts and the host runtime of paged caches (host_paged.cpp) for
// Python. No tensor and no torch header comes in here, so this module is bound to a Python version
// only, never to a torch version. It is optional at run time.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define ATTNFORGE_X86 1
#endif

namespace py = pybind11;

namespace attnforge::host {
void bind_paged(py::module_& m);
}

namespace {

#ifdef ATTNFORGE_X86
struct CpuidRegisters {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf that the CPU does not have.
CpuidRegisters cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidRegisters r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// Register states that the operating system saves (XCR0). A feature is usable only with its state:
// cpuid alone also reports AVX-512 under kernels and hypervisors that do not save zmm.
uint64_t saved_states(bool osxsave) {
  if (!osxsave) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr bool bit(uint32_t word, int index) {
  return ((word >> index) & 1u) != 0;
}
#endif

py::dict cpu_features() {
  py::dict features;
#ifdef ATTNFORGE_X86
  const CpuidRegisters leaf1 = cpuid(1, 0);
  const CpuidRegisters leaf7 = cpuid(7, 0);
  const CpuidRegisters leaf7_1 = cpuid(7, 1);
  const uint64_t states = saved_states(bit(leaf1.ecx, 27));
  const bool ymm = (states & 0x6) == 0x6;
  const bool zmm = ymm && (states & 0xe0) == 0xe0;
  const bool tiles = (states & 0x60000) == 0x60000;
  features["sse4_2"] = bit(leaf1.ecx, 20);
  features["avx"] = ymm && bit(leaf1.ecx, 28);
  features["fma"] = ymm && bit(leaf1.ecx, 12);
  features["f16c"] = ymm && bit(leaf1.ecx, 29);
  features["avx2"] = ymm && bit(leaf7.ebx, 5);
  features["avx512f"] = zmm && bit(leaf7.ebx, 16);
  features["avx512dq"] = zmm && bit(leaf7.ebx, 17);
  features["avx512cd"] = zmm && bit(leaf7.ebx, 28);
  features["avx512bw"] = zmm && bit(leaf7.ebx, 30);
  features["avx512vl"] = zmm && bit(leaf7.ebx, 31);
  features["avx512_vnni"] = zmm && bit(leaf7.ecx, 11);
  features["avx512_bf16"] = zmm && bit(leaf7_1.eax, 5);
  features["avx512_fp16"] = zmm && bit(leaf7.edx, 23);
  features["amx_tile"] = tiles && bit(leaf7.edx, 24);
  features["amx_bf16"] = tiles && bit(leaf7.edx, 22);
  features["amx_int8"] = tiles && bit(leaf7.edx, 25);
#endif
  return features;
}

std::string cpu_name() {
#ifdef ATTNFORGE_X86
  if (cpuid(0x80000000u, 0).eax < 0x80000004u) return "";
  std::string name;
  for (uint32_t leaf = 0x80000002u; leaf <= 0x80000004u; ++leaf) {
    const CpuidRegisters r = cpuid(leaf, 0);
    for (const uint32_t word : {r.eax, r.ebx, r.ecx, r.edx}) {
      for (int byte = 0; byte < 4; ++byte) {
        const char c = static_cast<char>((word >> (8 * byte)) & 0xff);
        if (c != '\0') name.push_back(c);
      }
    }
  }
  const std::size_t first = name.find_first_not_of(' ');
  if (first == std::string::npos) return "";
  return name.substr(first, name.find_last_not_of(' ') - first + 1);
#else
  return "";
#endif
}

py::dict build_info() {
  py::list levels;
  const std::string list = ATTNFORGE_ISA_LEVELS;
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t comma = list.find(',', begin);
    const std::size_t end = comma == std::string::npos ? list.size() : comma;
    levels.append(list.substr(begin, end - begin));
    begin = end + 1;
  }
  py::dict info;
  info["version"] = ATTNFORGE_VERSION;
  info["compiler"] = ATTNFORGE_COMPILER;
  info["flags"] = ATTNFORGE_KERNEL_FLAGS;
  info["isa_levels"] = levels;
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What the CPU can do, how the native code was built, and pools of cache pages.";
  m.def("cpu_features", &cpu_features,
        "Instruction sets that the CPU has and the operating system saves: name -> bool. "
        "Empty on other architectures than x86.");
  m.def("cpu_name", &cpu_name, "The CPU's brand string, or '' where it has none.");
  m.def("build_info", &build_info,
        "Compiler, kernel flags, ISA levels and version of the native build.");
  attnforge::host::bind_paged(m);
}
