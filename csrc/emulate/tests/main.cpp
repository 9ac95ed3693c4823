// emulator_tests [--seed n] [name...]: runs the named tests, or all but those that crash; exit
// status 1 if one fails. Seeds of schedules count from n, or 1.
#include <cstdio>
#include <string>

#include "testing.h"

namespace attnforge::emulate::testing {

std::map<std::string, void (*)()>& tests() {
  static std::map<std::string, void (*)()> all;
  return all;
}

std::map<std::string, void (*)()>& crashes() {
  static std::map<std::string, void (*)()> all;
  return all;
}

uint64_t& first_seed() {
  static uint64_t seed = 1;
  return seed;
}

}  // namespace attnforge::emulate::testing

int main(int count, char** names) {
  using namespace attnforge::emulate::testing;
  std::vector<std::string> chosen(names + 1, names + count);
  if (chosen.size() >= 2 && chosen[0] == "--seed") {
    first_seed() = std::stoull(chosen[1]);
    chosen.erase(chosen.begin(), chosen.begin() + 2);
  }
  if (chosen.empty()) {
    for (const auto& [name, run] : tests()) chosen.push_back(name);
  }
  int failed = 0;
  for (const std::string& name : chosen) {
    try {
      const auto& from = crashes().count(name) ? crashes() : tests();
      const auto found = from.find(name);
      if (found == from.end()) throw std::runtime_error("there is no such test");
      attnforge::emulate::set_options(seeded());
      found->second();
      std::printf("ok    %s\n", name.c_str());
    } catch (const std::exception& error) {
      std::printf("FAIL  %s: %s\n", name.c_str(), error.what());
      ++failed;
    }
  }
  return failed ? 1 : 0;
}
