// Named tests of one program: `program name` runs one, `program` all; a failed EXPECT says where and what.
#pragma once
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace harness {

struct Test { const char* name; void (*run)(); };

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int failures = 0;

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::printf("%s:%d: %s\n", file, line, what.c_str());
}

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline int main(int argc, char** argv) {
  bool found = false;
  for (const Test& test : tests())
    if (argc < 2 || !std::strcmp(argv[1], test.name)) {
      found = true;
      test.run();
    }
  if (!found) std::printf("there is no test %s\n", argv[1]);
  return failures || !found;
}

}  // namespace harness

#define TEST(name)                                                        \
  static void name();                                                     \
  static const harness::Registration registration_of_##name(#name, name); \
  static void name()

#define EXPECT(condition) \
  if (!(condition)) harness::fail(__FILE__, __LINE__, "not true: " #condition)

#define EXPECT_EQUAL(a, b)                                                                      \
  if (const auto left = (a); !(left == (b)))                                                    \
  harness::fail(__FILE__, __LINE__, std::string(#a " is ") + std::to_string(left) + ", not " #b \
                                                                                    " = " + std::to_string(b))
