// Parameters of the row kernels: plain structs, a shape on every pointer.
#pragma once
#include <cstdint>

namespace rows {

enum class Dtype : int { Float32 = 0, Bfloat16 = 1, Float16 = 2 };

constexpr int size_of(Dtype dtype) { return dtype == Dtype::Float32 ? 4 : 2; }

// M rows of N neighbours. Row i = (i0 · R1 + i1) · R2 + i2 begins at data + i0 · step[0] + i1 · step[1] + i2 · step[2].
struct Matrix {
  void* data = nullptr;  // nullptr: there is none
  int64_t step[3] = {};  // in elements
  Dtype dtype = Dtype::Float32;
  bool wide = false;  // a thread's neighbours are aligned, so that they move as one access
};

struct Vector {
  void* data = nullptr;  // (N,), contiguous; nullptr: there is none
  Dtype dtype = Dtype::Float32;
  bool wide = false;
};

// One number per row, at data + i0 · step[0] + i1 · step[1] + i2 · step[2].
struct Column {
  void* data = nullptr;
  int64_t step[3] = {};
  Dtype dtype = Dtype::Float32;
};

// How a kernel walks over the rows: which threads share one, and in how many pieces they read it.
struct Walk {
  int M = 0, N = 0;
  int R1 = 1, R2 = 1;        // row i = (i0 · R1 + i1) · R2 + i2
  int log_threads = 5;       // of one CTA that share a row
  int log_cluster = 0;       // CTAs that share a row
  int chunks = 1;            // pieces of a row, each of which fits the registers of its threads
  int kept = 0;              // how many chunks but the last shared memory keeps for the second pass
  bool shifted = false;      // rows begin off alignment, all matrices' alike: packs are aligned in memory, not in n
};

struct NormForward {
  Walk walk;
  Matrix y;             // (M, N), of x's dtype or fp32
  Matrix h;             // (M, N) residual + x, of residual's dtype; none without a residual
  Matrix x, residual;   // (M, N); residual of x's dtype or fp32, or none
  Vector weight, bias;  // (N,), of x's dtype or fp32, or none
  float* stats;         // (2, M) mean and rstd; RMSNorm: (1, M) rstd
  float eps, weight_offset;
  bool rms;
};

struct NormBackward {
  Walk walk;
  Matrix dx, dresidual;  // (M, N) of x's dtype and of residual's, each or none
  Matrix dy, h;          // (M, N); h is what was normalised
  Matrix dh;             // (M, N) gradient of h beside that through y, of h's dtype, or none
  Vector weight;         // (N,), of dx's dtype or fp32, or none
  const float* stats;    // (2, M) or (1, M), as the forward left it
  float *dweight_parts, *dbias_parts;  // (P, N) fp32, each or none
  float weight_offset;
  bool rms;
};

struct SumParts {
  Vector out;          // (N,)
  const float* parts;  // (P, N)
  int P, N;
};

struct Softmax {
  Walk walk;
  Matrix out;           // (M, N) y, or dx
  Matrix x;             // (M, N); the backward's: dy
  Matrix y;             // (M, N) of the backward alone
  const uint8_t* mask;  // (M, N) bool, at i0 · step[0] + i1 · step[1] + i2 · step[2] + n · step[3]; or none
  int64_t mask_step[4];
  bool mask_wide;       // E neighbours of the mask are one aligned access
  float scale;
  bool log, causal;
  int diagonal;  // causal: row (i0, i1, i2) sees n <= i2 + diagonal
};

struct CrossEntropy {
  Walk walk;
  Matrix dlogits;  // (M, N), which may be logits, or none
  Matrix logits;   // (M, N)
  Column loss;     // (M,) fp32 or of the loss's dtype; forward alone
  Column dloss;    // (M,) factor on dlogits, or none
  float *row_max, *row_sum;   // (M,) by the steps of `statistics`, or none
  int64_t statistics[3];
  const void* target;         // (M,) int64 or int32, by target_step
  int64_t target_step[3];
  bool target_64;
  Vector weight;              // (N,), of the logits' dtype or fp32, or none
  const float* divisor;       // (1,), or none
  int64_t ignore_index;
  float smoothing, z_loss, softcap;  // softcap 0: none
};

struct ScaleRows {
  Walk walk;
  Matrix out, x;  // (M, N); out may be x
  Column factor;  // (M,)
};

// A CTA's sum of a slice of P values.
struct SumValues {
  Vector out;            // (gridDim.x,)
  const float* values;   // (P,)
  const float* divisor;  // (1,) of the sums, or none
  int64_t P;
};

// A CTA's sum of the weights of a slice of P classes.
struct CountClasses {
  Vector out;          // (gridDim.x,)
  const void* target;  // (P,) int64 or int32, contiguous
  bool target_64;
  Vector weight;       // (N,), or none: every class weighs 1
  int64_t ignore_index;
  int N;
  int64_t P;
};

}  // namespace rows
