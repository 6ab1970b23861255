// From a request to a launch of the attention forward: what shares a tile, in which order, which tensor maps, how
// many CTAs.
#pragma once
#include <launch.h>
#include <sm90/attention_forward.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sm90 {

// How many heads of a group share a tile of queries: the fewest that need the fewest tiles. A power of two.
inline int packed_heads(int G, int S_q, int BLOCK_M) {
  int best = 1, fewest = 0;
  for (int P = 1; P <= 64 && G % P == 0; P *= 2) {
    const int64_t rows = static_cast<int64_t>(S_q) * P;
    const int tiles = static_cast<int>((rows + BLOCK_M - 1) / BLOCK_M) * (G / P);
    if (P == 1 || tiles < fewest) {
      best = P;
      fewest = tiles;
    }
  }
  return best;
}

// A dimension of a tensor map: its size and its stride in elements.
struct Dimension {
  int size;
  int64_t stride;
};

// `dimensions` and `box`: innermost first, the innermost contiguous. What is empty is never read, and what has size 1
// never steps, so that their addresses and strides are replaced by some that TMA accepts.
template <class T, int COLUMNS, int RANK>
ptx::TensorMap tensor_map(const char* name, const void* base, const void* substitute,
                          const Dimension (&dimensions)[RANK], const uint32_t (&box)[RANK]) {
  uint64_t sizes[RANK], strides[RANK - 1];
  for (int i = 0; i < RANK; i++) {
    if (dimensions[i].size == 0) base = substitute;
    sizes[i] = std::max(dimensions[i].size, 1);
    if (i == 0) continue;
    strides[i - 1] = dimensions[i].size <= 1 ? sizeof(T) * COLUMNS : sizeof(T) * dimensions[i].stride;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] == 0 || strides[i - 1] >> 40 != 0) {
      throw std::invalid_argument(std::string("`") + name + "` has a stride of " +
                                  std::to_string(dimensions[i].stride) +
                                  " elements; all but the last are positive multiples of 16 bytes below 2^40 bytes.");
    }
  }
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    throw std::invalid_argument(std::string("`") + name + "` begins at an address that is no multiple of 16 bytes.");
  }
  return ptx::make_tensor_map(ptx::element_type<T>::value, const_cast<void*>(base), RANK, sizes, strides, box,
                              attention::Panels<COLUMNS>::SWIZZLE);
}

// Order and number of the items; see attention/scheduler.h.
inline void schedule(ForwardArguments& a, const AttentionConfig& C, bool bounded_right, bool bounded, int sms) {
  constexpr int64_t L2_BYTES = 32 << 20;  // of 50 MiB, for K and V of a section
  const bool varlen = a.cu_seqlens_q != nullptr;
  const int64_t kv_bytes = static_cast<int64_t>(a.S_k) * (C.D + C.D_v) * 2;
  a.dynamic = varlen || bounded;
  a.longest_first = bounded_right;
  a.heads = varlen ? a.heads_per_batch : a.heads_per_batch * a.B;
  a.cluster = 1;
  if (varlen) {
    a.m_blocks = attention::varlen_slots(a.S_q, a.B, C.BLOCK_M >> a.log2_P);
  } else {
    const int rows = a.S_q << a.log2_P, blocks = (rows + C.BLOCK_M - 1) / C.BLOCK_M;
    if (!a.dynamic && blocks > 1 && sms >= C.CLUSTER) a.cluster = C.CLUSTER;
    a.m_blocks = (blocks + a.cluster - 1) / a.cluster;
  }
  const int64_t kv_heads = std::max<int64_t>(L2_BYTES / std::max<int64_t>(kv_bytes, 1), 1);
  a.section = a.dynamic ? static_cast<int>(std::min<int64_t>(kv_heads * a.group, a.heads)) : 1;
  a.n_items = a.m_blocks * a.heads;
}

template <class T, class Config>
ForwardArguments forward_arguments(const AttentionForwardParams& x, int sms) {
  constexpr AttentionConfig C = Config::value;
  constexpr uint32_t Q_PANEL = attention::Panels<C.D>::WIDTH, V_PANEL = attention::Panels<C.D_v>::WIDTH;
  ForwardArguments a{};
  static_cast<AttentionForwardParams&>(a) = x;
  const bool varlen = x.cu_seqlens_q != nullptr;
  const int G = x.H / x.H_kv, batch = varlen ? 1 : x.B;
  const int P = packed_heads(G, varlen ? (x.S_q + x.B - 1) / x.B : x.S_q, C.BLOCK_M);
  if (static_cast<int64_t>(x.S_q) * P + x.S_k + C.BLOCK_M >= 1 << 29) {
    throw std::invalid_argument("`q` has " + std::to_string(x.S_q) + " rows of " + std::to_string(P) +
                                " heads and `k` " + std::to_string(x.S_k) + "; together they are less than 2^29.");
  }
  while (1 << a.log2_P < P) a.log2_P++;
  a.heads_per_batch = x.H / P;
  a.group = G / P;
  a.score = attention::make_score(x.scale, x.softcap);

  const int64_t all = static_cast<int64_t>(x.S_q) + x.S_k;
  a.window_left = static_cast<int>(std::clamp(x.left, -all, all));
  a.window_right = static_cast<int>(std::clamp(x.right, -all, all));
  const bool bounded_right = x.right < all, bounded = bounded_right || x.left < all;
  a.hidden_keys = varlen || bounded;
  schedule(a, C, bounded_right, bounded, sms);

  const uint32_t p = P, keys = C.BLOCK_N / a.cluster;
  a.q_map = tensor_map<T, C.D, 5>("q", x.q, x.q,
                                  {{C.D, 1}, {P, x.stride_qh}, {x.S_q, x.stride_qm}, {x.H / P, x.stride_qh * P},
                                   {batch, x.stride_qb}}, {Q_PANEL, p, 64 / p, 1, 1});
  a.o_map = tensor_map<T, C.D_v, 5>("o", x.o, x.o,
                                    {{C.D_v, 1}, {P, x.stride_oh}, {x.S_q, x.stride_om}, {x.H / P, x.stride_oh * P},
                                     {batch, x.stride_ob}}, {V_PANEL, p, 64 / p, 1, 1});
  a.k_map = tensor_map<T, C.D, 4>("k", x.k, x.q, {{C.D, 1}, {x.S_k, x.stride_kn}, {x.H_kv, x.stride_kh},
                                                  {batch, x.stride_kb}}, {Q_PANEL, keys, 1, 1});
  a.v_map = tensor_map<T, C.D_v, 4>("v", x.v, x.q, {{C.D_v, 1}, {x.S_k, x.stride_vn}, {x.H_kv, x.stride_vh},
                                                    {batch, x.stride_vb}}, {V_PANEL, keys, 1, 1});
  return a;
}

template <class T, class Config, class Planted = NoBugs>
void launch_attention_forward(const AttentionForwardParams& x, cudaStream_t stream) {
  constexpr AttentionConfig C = Config::value;
  if (x.B == 0 || x.H == 0 || x.S_q == 0) return;
  const int sms = sm_count();
  const ForwardArguments a = forward_arguments<T, Config>(x, sms);
  if (a.dynamic && a.counter == nullptr) throw std::invalid_argument("`counter` is missing; this call needs one.");
  const int ctas = std::min(a.n_items, sms / a.cluster) * a.cluster;
  LaunchShape shape{dim3(ctas), C.threads(), C.shared_bytes(), a.cluster};
  launch(attention_forward_kernel<T, Config, Planted>, shape, stream, a);
}

}  // namespace sm90
