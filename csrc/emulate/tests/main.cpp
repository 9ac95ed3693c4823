// emulator_tests [name...]: runs the named tests, or all; exit status 1 if one fails.
#include <cstdio>

#include "testing.h"

namespace attnforge::emulate::testing {

std::map<std::string, void (*)()>& tests() {
  static std::map<std::string, void (*)()> all;
  return all;
}

}  // namespace attnforge::emulate::testing

int main(int count, char** names) {
  using attnforge::emulate::testing::tests;
  std::vector<std::string> chosen(names + 1, names + count);
  if (chosen.empty()) {
    for (const auto& [name, run] : tests()) chosen.push_back(name);
  }
  int failed = 0;
  for (const std::string& name : chosen) {
    const auto found = tests().find(name);
    try {
      if (found == tests().end()) throw std::runtime_error("there is no such test");
      attnforge::emulate::set_options({});
      found->second();
      std::printf("ok    %s\n", name.c_str());
    } catch (const std::exception& error) {
      std::printf("FAIL  %s: %s\n", name.c_str(), error.what());
      ++failed;
    }
  }
  return failed ? 1 : 0;
}
