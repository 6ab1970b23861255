// How many threads and CTAs share a row, chosen by a pure function.
//
//   packs of a row <= 32             8, 16 or 32 threads, one pack each; several rows per CTA
//   up to 512 threads' registers     32 to 512 threads, of 128 at least in a CTA
//   more than these hold, sm_90      a cluster of 2 to 8 CTAs of 256 or 512 threads
//   longer still                     chunks, of which shared memory keeps what it can
#pragma once
#include <params_rows.h>
#include <rows/limits.h>

#include <algorithm>
#include <string>

namespace rows {

struct RowConfig {
  int threads;          // of a CTA
  int threads_per_row;  // of a CTA
  int cluster;          // CTAs per row
  int chunks;           // of a row
  int kept;             // chunks in shared memory
  uint32_t shared_bytes;

  int rows_per_cta() const { return threads / threads_per_row; }
  std::string describe() const {
    return "threads=" + std::to_string(threads) + " threads_per_row=" + std::to_string(threads_per_row) + " cluster=" +
           std::to_string(cluster) + " chunks=" + std::to_string(chunks) + " kept=" + std::to_string(kept) +
           " shared_bytes=" + std::to_string(shared_bytes);
  }
};

struct RowProblem {
  int N;
  int pack;              // elements of a pack
  int elements;          // that a thread holds
  int kept_bytes;        // of a thread's chunk in shared memory; 0: nothing is kept
  bool shifted = false;  // rows may begin within a pack
};

struct RowLimits {
  bool clusters;
  int shared;                 // bytes of a CTA
  int threads = MAX_THREADS;  // of a CTA, from 64 on
};

constexpr int LEAST_THREADS = 128;  // of a CTA

// Why a kernel cannot run so; empty when it can.
inline std::string illegal(const RowConfig& c, const RowProblem& p, const RowLimits& limits) {
  const auto power_of_2 = [](int x) { return x > 0 && (x & (x - 1)) == 0; };
  if (!power_of_2(c.threads_per_row) || c.threads_per_row < 8) return "threads_per_row is no power of two from 8 on";
  if (c.threads % c.threads_per_row || c.threads > std::max(limits.threads, LEAST_THREADS))
    return "threads is no multiple of threads_per_row, or too many";
  if (!power_of_2(c.cluster) || c.cluster > MAX_CLUSTER) return "cluster is none of 1, 2, 4 and 8";
  if (c.cluster > 1 && !limits.clusters) return "there are no clusters before sm_90";
  if (c.cluster > 1 && c.threads_per_row < 64) return "a CTA of a cluster has less than two warps";
  if ((c.cluster > 1 || c.chunks > 1) && c.threads != c.threads_per_row)
    return "a CTA that has only a part of a row at once has more than one row";
  if (int64_t(c.chunks) * c.threads_per_row * c.cluster * p.elements < p.N + (p.shifted ? p.pack - 1 : 0))
    return "the chunks do not cover the row";
  if (c.shared_bytes > static_cast<uint32_t>(limits.shared)) return "a CTA has less shared memory";
  return "";
}

inline int next_power_of_2(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

inline RowConfig choose(const RowProblem& p, const RowLimits& limits) {
  const int64_t packs = (int64_t(p.N) + p.pack - 1) / p.pack + (p.shifted ? 1 : 0);
  const int packs_per_thread = p.elements / p.pack;
  const int64_t full = (packs + packs_per_thread - 1) / packs_per_thread;  // threads that hold the row in one chunk
  RowConfig c{};
  c.cluster = 1;
  if (packs <= 32) {
    c.threads_per_row = std::max(8, next_power_of_2(packs));
  } else {
    c.threads_per_row = std::clamp(next_power_of_2(full), 32, limits.threads);
    if (limits.clusters && full > limits.threads) {
      const int half = std::max(limits.threads / 2, 64);
      c.cluster = std::min(next_power_of_2((full + half - 1) / half), MAX_CLUSTER);
      c.threads_per_row = std::clamp(next_power_of_2((full + c.cluster - 1) / c.cluster), 64, limits.threads);
    }
  }
  const int64_t a_chunk = int64_t(c.threads_per_row) * c.cluster;
  c.chunks = static_cast<int>((full + a_chunk - 1) / a_chunk);
  c.threads = c.cluster > 1 || c.chunks > 1 ? c.threads_per_row : std::max(c.threads_per_row, LEAST_THREADS);
  const uint32_t kept_bytes = static_cast<uint32_t>(p.kept_bytes) * c.threads;
  if (kept_bytes) c.kept = std::min<int>(c.chunks - 1, (limits.shared - REDUCTION_BYTES) / kept_bytes);
  c.shared_bytes = REDUCTION_BYTES + c.kept * kept_bytes;
  return c;
}

}  // namespace rows
