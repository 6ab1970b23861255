// Which instruction set runs. A kernel is declared once for every set that the sources are compiled for:
//
//   FASTATTN_FOR_EACH_ISA(void softmax(const SoftmaxParams&, int threads);)
//
// and called for the one in use by FASTATTN_CALL(softmax(params, threads)).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastattn {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

#if defined(FASTATTN_ONLY_ISA)  // a module for one set alone, as tests with sanitizers build it
#define FASTATTN_FOR_EACH_ISA(declaration) \
  namespace FASTATTN_ONLY_ISA {            \
  declaration                              \
  }
#define FASTATTN_CALL(call) (FASTATTN_ONLY_ISA::call)
#elif defined(__x86_64__)
#define FASTATTN_FOR_EACH_ISA(declaration) \
  namespace baseline {                     \
  declaration                              \
  }                                        \
  namespace avx2 {                         \
  declaration                              \
  }                                        \
  namespace avx512 {                       \
  declaration                              \
  }                                        \
  namespace avx512_bf16 {                  \
  declaration                              \
  }
#define FASTATTN_CALL(call)                                            \
  (::fastattn::isa() == ::fastattn::Isa::avx512_bf16 ? avx512_bf16::call \
   : ::fastattn::isa() == ::fastattn::Isa::avx512    ? avx512::call      \
   : ::fastattn::isa() == ::fastattn::Isa::avx2      ? avx2::call        \
                                                     : baseline::call)
#else
#define FASTATTN_FOR_EACH_ISA(declaration) \
  namespace baseline {                     \
  declaration                              \
  }
#define FASTATTN_CALL(call) (baseline::call)
#endif

// The set in use: the best that the CPU has, or the one that FASTATTN_CPU_ISA names. Throws std::invalid_argument with
// a sentence if that is unknown or the CPU lacks it.
Isa isa();
void set_isa(const std::string& name);  // "" chooses as at the start
std::string isa_name();
std::vector<std::string> available_isas();  // from the plainest to the best

// Whether this process was forked after the module was loaded.
bool in_forked_child();

// Memory aligned to 64 bytes and not initialised; throws std::bad_alloc, so before any parallel loop.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  size_t bytes_;
  char* data_;
};

}  // namespace fastattn
