// Errors of the host runtime. Each is a sentence: who, argument, value, what is allowed, next step.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace attnforge::host {

// The pool cannot serve a request; nothing was changed. A RuntimeError in Python.
struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  text << "attnforge._host.PagePool.";
  (text << ... << parts);
  return text.str();
}

// A ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::invalid_argument(sentence(parts...));
}

}  // namespace attnforge::host
