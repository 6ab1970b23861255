// The line of the kernel that called a wrapper: `Where where = Where::here()` as a last default argument.
#pragma once

namespace emulator {

struct Where {
  const char* file = "";
  int line = 0;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace emulator
