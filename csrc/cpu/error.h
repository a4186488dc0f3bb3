// The message behind gfl_last_error(), per thread.
#pragma once

#include <string>

namespace gfl {

void set_error(std::string message);

}  // namespace gfl
