// Failures of the C functions of gfl_kernels.h.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace gfl {

// The message behind gfl_last_error(), per thread.
void set_error(std::string message);

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

// What a C function returns: 0, or 1 after an exception, whose message is kept.
template <typename F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    set_error(error.what());
    return 1;
  }
}

}  // namespace gfl
