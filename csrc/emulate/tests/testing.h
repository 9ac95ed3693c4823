// A test is EMULATOR_TEST(name) { ... }; the program runs those whose names it is given.
//
// tests/cuda/test_emulator.py finds the names in the sources and runs each one in a process.
#pragma once

#include <cmath>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace attnforge::emulate::testing {

std::map<std::string, void (*)()>& tests();

std::map<std::string, void (*)()>& crashes();
uint64_t& first_seed();  // of the command line

struct Registered {
  Registered(std::map<std::string, void (*)()>& into, const char* name, void (*run)()) {
    into[name] = run;
  }
};

// Options of a launch whose schedule is the n-th of this run of the program.
inline Options seeded(uint64_t n = 0, uint32_t preempt = Options{}.preempt) {
  Options options;
  options.seed = first_seed() + n;
  options.preempt = preempt;
  return options;
}

inline void require(bool holds, const char* text, const char* file, int line) {
  if (holds) return;
  std::ostringstream sentence;
  sentence << file << ":" << line << ": " << text << " does not hold";
  throw std::runtime_error(sentence.str());
}

inline void require_equal(double found, double wanted, double tolerance, const std::string& what) {
  if (found == wanted || std::fabs(found - wanted) <= tolerance) return;
  std::ostringstream sentence;
  sentence << what << " is " << found << ", wanted " << wanted << " within " << tolerance;
  throw std::runtime_error(sentence.str());
}

// The launch must end in a report that holds every one of `parts`.
inline void expect_report(const std::function<void()>& launch,
                          const std::vector<std::string>& parts) {
  std::string report;
  try {
    launch();
  } catch (const Error& error) {
    report = error.what();
  }
  if (report.empty()) throw std::runtime_error("the emulator reported nothing");
  for (const std::string& part : parts) {
    if (report.find(part) == std::string::npos) {
      throw std::runtime_error("'" + part + "' is not in the report: " + report);
    }
  }
}

// Numbers in [-1, 1) that repeat from run to run.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 1664525u + 1013904223u;
    return state_ ^ state_ >> 16;
  }
  float unit() { return static_cast<float>(bits() >> 8) / 8388608.0f - 1.0f; }

 private:
  uint32_t state_;
};

}  // namespace attnforge::emulate::testing

#define EMULATOR_REGISTER(into, name)                                       \
  static void test_##name();                                                \
  static const ::attnforge::emulate::testing::Registered registered_##name( \
      ::attnforge::emulate::testing::into(), #name, test_##name);           \
  static void test_##name()

#define EMULATOR_TEST(name) EMULATOR_REGISTER(tests, name)
// Ends the process under AddressSanitizer; runs only where it is named.
#define EMULATOR_CRASH(name) EMULATOR_REGISTER(crashes, name)

#define REQUIRE(...) \
  ::attnforge::emulate::testing::require((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
