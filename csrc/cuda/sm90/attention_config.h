// The tile sizes of the attention forward on Hopper, and whether they fit. One value, chosen by a pure function.
#pragma once
#include <ptx/language.h>

#include <string>

namespace sm90 {

struct AttentionConfig {
  int D, D_v;
  int BLOCK_M;             // queries a CTA, 64 for each consumer warpgroup
  int BLOCK_N;             // keys a step
  int STAGES;              // K tiles in flight, and V tiles
  bool PING_PONG;          // consumer warpgroups take turns on the tensor cores
  int LAZY_RESCALE;        // how far in log2 a row's maximum may lag behind; 0: not at all
  int POLYNOMIAL_EIGHTHS;  // of 8 exponentials, how many are polynomials on the FMA pipe
  int POLYNOMIAL_DEGREE;   // 3, 4 or 5
  int CLUSTER;             // CTAs that share K and V by multicast when all their tiles are alike; 1: never

  __host__ __device__ constexpr int consumers() const { return BLOCK_M / 64; }
  __host__ __device__ constexpr int threads() const { return 128 * (1 + consumers()); }

  // Registers a thread, of 64 Ki an SM: 56/256, 40/232 or 32/160 for producer/consumers.
  __host__ __device__ constexpr int producer_registers() const {
    return consumers() == 1 ? 56 : consumers() == 2 ? 40 : 32;
  }
  __host__ __device__ constexpr int consumer_registers() const {
    return consumers() == 1 ? 256 : consumers() == 2 ? 232 : 160;
  }
  // S (64 × BLOCK_N fp32), P (the same, 16 bits), O (64 × D_v fp32), over 128 threads.
  __host__ __device__ constexpr int fragment_registers() const { return BLOCK_N / 2 + BLOCK_N / 4 + D_v / 2; }

  __host__ __device__ constexpr uint32_t q_bytes() const { return 64 * D * 2; }  // of one warpgroup
  __host__ __device__ constexpr uint32_t o_bytes() const { return 64 * D_v * 2; }
  __host__ __device__ constexpr uint32_t k_bytes() const { return BLOCK_N * D * 2; }  // of one stage
  __host__ __device__ constexpr uint32_t v_bytes() const { return BLOCK_N * D_v * 2; }
  __host__ __device__ static constexpr uint32_t control_bytes() { return 256; }  // barriers, and announced tiles
  __host__ __device__ static constexpr uint32_t shared_limit() { return 227 * 1024; }
  __host__ __device__ constexpr uint32_t operand_bytes() const {
    return consumers() * q_bytes() + STAGES * (k_bytes() + v_bytes());
  }
  // O has shared memory of its own where there is some; otherwise it takes that of Q, and the next Q has to wait.
  __host__ __device__ constexpr bool o_apart() const {
    return operand_bytes() + consumers() * o_bytes() + control_bytes() <= shared_limit();
  }
  __host__ __device__ constexpr uint32_t shared_bytes() const {
    return operand_bytes() + (o_apart() ? consumers() * o_bytes() : 0) + control_bytes();
  }

  // Why this cannot run, or null.
  __host__ __device__ constexpr const char* illegal() const {
    if (D % 32 != 0 || D_v % 32 != 0 || D > 256 || D_v > 256) return "D and D_v are multiples of 32 up to 256";
    if (D_v > D) return "D_v is at most D";
    if (BLOCK_M % 64 != 0 || consumers() < 1 || consumers() > 3) return "BLOCK_M is 64, 128 or 192";
    if (BLOCK_N % 16 != 0 || BLOCK_N > 256) return "BLOCK_N is a multiple of 16 up to 256";
    if (CLUSTER < 1 || CLUSTER > 2) return "CLUSTER is 1 or 2";
    if (BLOCK_N % (8 * CLUSTER) != 0) return "each CTA of a cluster loads whole groups of 8 keys";
    if (STAGES < 2 || STAGES > 4) return "STAGES is 2 to 4: one V is waited for while the last is held";
    if (LAZY_RESCALE < 0 || LAZY_RESCALE > 8) return "LAZY_RESCALE is 0 to 8: p of fp16 stays below 2^16";
    if (POLYNOMIAL_EIGHTHS < 0 || POLYNOMIAL_EIGHTHS > 8) return "POLYNOMIAL_EIGHTHS is 0 to 8";
    if (POLYNOMIAL_DEGREE < 3 || POLYNOMIAL_DEGREE > 5) return "POLYNOMIAL_DEGREE is 3 to 5";
    if (fragment_registers() + 24 > consumer_registers()) return "S, P and O do not fit into the consumers' registers";
    if (shared_bytes() > shared_limit()) return "Q, K, V and O do not fit into shared memory";
    return nullptr;
  }

  std::string describe() const {
    return "D " + std::to_string(D) + ", D_v " + std::to_string(D_v) + ", BLOCK_M " + std::to_string(BLOCK_M) +
           ", BLOCK_N " + std::to_string(BLOCK_N) + ", STAGES " + std::to_string(STAGES) + ", PING_PONG " +
           std::to_string(PING_PONG) + ", LAZY_RESCALE " + std::to_string(LAZY_RESCALE) + ", POLYNOMIAL_EIGHTHS " +
           std::to_string(POLYNOMIAL_EIGHTHS) + ", POLYNOMIAL_DEGREE " + std::to_string(POLYNOMIAL_DEGREE) +
           ", CLUSTER " + std::to_string(CLUSTER) + ", registers " + std::to_string(consumer_registers()) +
           ", shared bytes " + std::to_string(shared_bytes());
  }
};

// Reasons are in docs/cuda-attention.md; none of this has been tuned on hardware.
// Queries of width 64 come in tiles of 128 where there are few: those of 192 would pad them, and leave SMs idle.
constexpr AttentionConfig forward_config(int D, int D_v, bool few_queries) {
  //                                    D   D_v   M    N  stages p-p lazy poly degree cluster
  if (D == 64) return AttentionConfig{64, D_v, few_queries ? 128 : 192, 128, 2, true, 8, 0, 3, 1};
  if (D == 96) return AttentionConfig{96, D_v, 128, 128, 2, true, 8, 0, 3, 2};
  if (D == 128) return AttentionConfig{128, D_v, 128, 128, 2, true, 8, 0, 3, 2};
  if (D == 192) return AttentionConfig{192, D_v, 128, 112, 2, true, 8, 0, 3, 2};
  return AttentionConfig{256, D_v, 128, 80, 2, true, 8, 0, 3, 2};
}

// A config as a type, for templates.
template <int D_, int D_V_, bool FEW_QUERIES = false>
struct Tuned {
  static constexpr AttentionConfig value = forward_config(D_, D_V_, FEW_QUERIES);
};

}  // namespace sm90
