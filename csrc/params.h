// What the kernels of attention are asked for: plain structs, a shape beside every pointer.
#pragma once
#include <cstdint>

enum class AttentionDtype { Bf16, Fp16 };

// o = softmax(f(q kᵀ)) v, lse = log Σ exp; f and the window are those of fastattn.attention.
//
// Every tensor has a last stride of 1, a base aligned to 16 bytes, and other strides that are multiples of 16 bytes and
// less than 2^40 bytes, where its size there is not 1. Packed sequences: B is the number of sequences, tensors are
// (1, H, T, D), and S_q and S_k stand for T_q and T_k.
struct AttentionForwardParams {
  AttentionDtype dtype;
  const void* q;  // [B, H, S_q, D], strides in elements
  const void* k;  // [B, H_kv, S_k, D]
  const void* v;  // [B, H_kv, S_k, D_v]
  void* o;        // [B, H, S_q, D_v]
  float* lse;     // [B, H, S_q] contiguous, natural logarithm
  float* lse_low;  // [B, H, S_q] contiguous: what fp32 rounds off lse
  int64_t stride_qb, stride_qh, stride_qm;
  int64_t stride_kb, stride_kh, stride_kn;
  int64_t stride_vb, stride_vh, stride_vn;
  int64_t stride_ob, stride_oh, stride_om;
  const int* cu_seqlens_q;  // [B + 1], not decreasing, from 0; null: not packed
  const int* cu_seqlens_k;  // [B + 1]
  int* counter;             // [2], zero before and after each launch; no two launches may share it at a time

  int B, H, H_kv, S_q, S_k, D, D_v;
  float scale;
  float softcap;      // 0: none
  int64_t left;       // row i sees keys i + shift - left … i + shift + right; any number of S_q + S_k and more: all
  int64_t right;
  bool bottom_right;  // shift is S_k - S_q (of each sequence), else 0
};
