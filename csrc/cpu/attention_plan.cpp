// How a call is cut into tasks. What a row is summed over, and in which order, never depends on the number of threads.
#include <algorithm>

#include "attention.h"

namespace fastattn {
namespace {

constexpr int FEW_TILES = 64;       // fewer tiles of queries than this are cut along the keys too
constexpr int SHORTEST_PART = 512;  // keys

int64_t tiles_of(const AttentionParams& p) {
  int64_t tiles = 0;
  for (const Sequence& s : p.sequences) tiles += s.S_q == 0 ? 0 : RowLayout{p.G(), s.S_q}.tiles();
  return tiles * p.H_kv;
}

}  // namespace

ForwardPlan plan_forward(const AttentionParams& p, int threads) {
  ForwardPlan plan;
  const int64_t tiles = tiles_of(p);
  if (tiles == 0) return plan;
  // Tiles that one task brings to a block of keys share the cost of packing it.
  plan.most_tiles = int(std::clamp<int64_t>(tiles / (4 * threads), 1, 4));
  const int most_parts = int((FEW_TILES + tiles - 1) / tiles);
  for (int b = 0; b < p.B; ++b) {
    const Sequence& s = p.sequences[b];
    if (s.S_q == 0) continue;
    const int n_tiles = RowLayout{p.G(), s.S_q}.tiles();
    const int parts = std::clamp(s.S_k / SHORTEST_PART, 1, most_parts);
    const int keys = ((s.S_k + parts - 1) / parts + BLOCK_N - 1) / BLOCK_N * BLOCK_N;
    for (int h = 0; h < p.H_kv; ++h) {
      if (parts == 1) {  // the last tiles first: with a causal window they are the largest
        for (int end = n_tiles; end > 0; end -= plan.most_tiles) {
          const int first = std::max(0, end - plan.most_tiles);
          plan.tasks.push_back({b, h, first, end - first, 0, s.S_k, -1});
        }
        continue;
      }
      for (int tile = 0; tile < n_tiles; ++tile) {
        const int first_part = plan.parts;
        for (int n = 0; n < s.S_k; n += keys)
          plan.tasks.push_back({b, h, tile, 1, n, std::min(n + keys, s.S_k), plan.parts++});
        plan.combine.push_back({b, h, tile, first_part, plan.parts - first_part});
      }
    }
  }
  return plan;
}

void attention_forward(const AttentionParams& p, int threads) {
  const ForwardPlan plan = plan_forward(p, threads);
  FASTATTN_CALL(run_forward(p, plan, threads));
}

}  // namespace fastattn
