#include "dispatch.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

namespace fastattn {
namespace {

const char* const NAMES[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:  // every CPU with both of these also converts fp16
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// `said_by`: whose value `name` is
Isa parse(const std::string& name, const std::string& said_by) {
  for (int i = 0; i < 4; ++i) {
    if (name != NAMES[i]) continue;
    if (cpu_has(Isa(i))) return Isa(i);
    throw std::invalid_argument(said_by + " is '" + name + "', which this CPU does not have; it has " +
                                listed(available_isas()) + ".");
  }
  throw std::invalid_argument(said_by + " is '" + name + "'; it must be one of " + listed(available_isas()) + ".");
}

Isa chosen() {
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced, "FASTATTN_CPU_ISA");
  for (int i = 3; i > 0; --i) {
    if (cpu_has(Isa(i))) return Isa(i);
  }
  return Isa::baseline;
}

// A few pieces of memory are kept for the next call: fresh memory costs a page fault for every 4 KiB.
#if defined(__SANITIZE_ADDRESS__)  // which is to see the end of what a call asked for, not of a larger piece
constexpr size_t LARGEST_POOLED = 0;
#else
constexpr size_t LARGEST_POOLED = size_t(16) << 20;
#endif
constexpr int MOST_POOLED = 4;
struct Piece {
  char* data = nullptr;
  size_t bytes = 0;
};
std::mutex pool_lock;
Piece pool[MOST_POOLED];

std::atomic<int> current{-1};  // -1: not chosen yet

std::atomic<bool> forked{false};
const int watching = pthread_atfork(
    [] { pool_lock.lock(); }, [] { pool_lock.unlock(); }, [] { forked = true, pool_lock.unlock(); });

}  // namespace

Isa isa() {
  int i = current.load(std::memory_order_relaxed);
  if (i < 0) current = i = int(chosen());
  return Isa(i);
}

void set_isa(const std::string& name) { current = int(name.empty() ? chosen() : parse(name, "set_isa: `name`")); }

std::string isa_name() { return NAMES[int(isa())]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < 4; ++i) {
    if (cpu_has(Isa(i))) names.push_back(NAMES[i]);
  }
  return names;
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

Scratch::Scratch(size_t bytes) : bytes_((bytes + 63) / 64 * 64), data_(nullptr) {
  if (bytes_ == 0) return;
  {
    const std::lock_guard<std::mutex> guard(pool_lock);
    Piece* smallest = nullptr;  // of those that are large enough
    for (Piece& piece : pool)
      if (piece.bytes >= bytes_ && (smallest == nullptr || piece.bytes < smallest->bytes)) smallest = &piece;
    if (smallest != nullptr) {
      data_ = std::exchange(smallest->data, nullptr);
      bytes_ = std::exchange(smallest->bytes, 0);
      return;
    }
  }
  data_ = static_cast<char*>(std::aligned_alloc(64, bytes_));
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() {
  if (data_ == nullptr) return;
  if (bytes_ <= LARGEST_POOLED) {  // in place of the smallest piece, if that is smaller
    const std::lock_guard<std::mutex> guard(pool_lock);
    Piece* smallest = pool;
    for (Piece& piece : pool)
      if (piece.bytes < smallest->bytes) smallest = &piece;
    if (bytes_ > smallest->bytes) {
      std::swap(data_, smallest->data);
      std::swap(bytes_, smallest->bytes);
    }
  }
  std::free(data_);
}

}  // namespace fastattn
