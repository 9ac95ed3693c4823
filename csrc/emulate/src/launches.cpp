// What ran, for the test suite: a line for every kernel, and for every launch of it with more
// shared memory than before. Written at once, since test processes do not all end in order.
#include <attnforge_emulate/launch.h>
#include <dlfcn.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>

namespace attnforge::emulate {

void note_launch(const void* kernel, uint32_t bytes) {
  static std::mutex one_file;
  static std::map<const void*, uint32_t> most;
  const std::lock_guard<std::mutex> lock(one_file);
  const auto [found, is_new] = most.try_emplace(kernel, bytes);
  if (!is_new && found->second >= bytes) return;
  found->second = bytes;
  Dl_info library{};  // kernels have no symbols at run time: an offset is what `nm` can name
  if (!dladdr(kernel, &library)) return;
  const std::filesystem::path folder =
      std::filesystem::path(library.dli_fname).parent_path() / "launches";
  std::ofstream file(folder / std::to_string(getpid()), std::ios::app);  // none without a folder
  file << static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase) << " "
       << bytes << "\n";
}

}  // namespace attnforge::emulate
