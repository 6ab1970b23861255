// What a launch did wrong, one finding per source line and kind.
#pragma once
#include <emulator/where.h>

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Finding {
  std::string kind;     // a few words, the same for every occurrence
  Where where;
  std::string message;  // of the first occurrence
  uint64_t count = 1;
};

class Report {
 public:
  void add(const std::string& kind, const Where& where, const std::string& message);
  bool clean() const { return findings_.empty(); }
  const std::vector<Finding>& findings() const { return findings_; }
  std::string text() const;

 private:
  std::vector<Finding> findings_;
};

std::string hex(uint32_t address);
std::string to_string(const Where& where);

}  // namespace emulator
