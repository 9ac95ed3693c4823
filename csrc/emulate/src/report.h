// The sentences of a report.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>

namespace attnforge::emulate {

// " at softmax.h:41"
std::string at(const std::source_location& site);

// "thread 33 (warp 1, lane 1)", or "the mbarrier at byte 64" for an agent that is one.
std::string agent_name(uint32_t agent);

// Throws Error: kernel, block and thread that run, site, cause, seed.
[[noreturn]] void fail(const std::source_location& site, const std::string& cause);

}  // namespace attnforge::emulate
