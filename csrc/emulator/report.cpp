#include <emulator/report.h>

#include <cstdio>
#include <cstring>

namespace emulator {

std::string hex(uint32_t address) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", address);
  return text;
}

std::string to_string(const Where& where) {
  const char* name = std::strrchr(where.file, '/');
  return std::string(name ? name + 1 : where.file) + ":" + std::to_string(where.line);
}

void Report::add(const std::string& kind, const Where& where, const std::string& message) {
  for (Finding& f : findings_)
    if (f.kind == kind && f.where.line == where.line && !std::strcmp(f.where.file, where.file)) {
      ++f.count;
      return;
    }
  findings_.push_back({kind, where, message, 1});
}

std::string Report::text() const {
  constexpr size_t most = 12;
  std::string text;
  for (size_t i = 0; i < findings_.size() && i < most; ++i) {
    const Finding& f = findings_[i];
    text += to_string(f.where) + ": " + f.kind + ": " + f.message;
    if (f.count > 1) text += " (" + std::to_string(f.count) + " times)";
    text += "\n";
  }
  if (findings_.size() > most) text += "and " + std::to_string(findings_.size() - most) + " more findings\n";
  return text;
}

}  // namespace emulator
