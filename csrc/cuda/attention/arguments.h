// What the attention forward kernel gets: the caller's request, and what the launcher made of it.
#pragma once
#include <attention/score.h>
#include <params.h>
#include <ptx/tensor_map.h>

namespace attention {

// P heads of a group of G = H / H_kv, a power of two, share one tile of queries: its row r is query r / P, head r % P.
struct ForwardArguments : AttentionForwardParams {
  ptx::TensorMap q_map;  // [B, H/P, S_q, P, D], box [1, 1, 64/P, P, panel]
  ptx::TensorMap k_map;  // [B, H_kv, S_k, D], box [1, 1, BLOCK_N/cluster, panel]
  ptx::TensorMap v_map;  // [B, H_kv, S_k, D_v], box likewise
  ptx::TensorMap o_map;  // [B, H/P, S_q, P, D_v], box [1, 1, 64/P, P, panel]
  Score score;
  int log2_P;
  int heads_per_batch;  // H / P
  int group;            // G / P: tiles of heads that share a key head
  int window_left;      // left and right, cut to S_q + S_k
  int window_right;
  int hidden_keys;      // whether a tile can hold keys that exist and some row does not see

  int m_blocks;         // query blocks, or slots of packed ones, of a head
  int heads, section;   // B · H/P, packed H/P; how many of them are taken together
  int n_items;          // m_blocks · heads
  int longest_first;
  int dynamic;          // items are claimed from `counter`
  int cluster;          // CTAs that share their keys
};

}  // namespace attention
