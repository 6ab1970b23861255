// How a call is cut into tasks. What a row is summed over, and in which order, never depends on the number of threads.
#include <algorithm>
#include <cmath>

#include "attention.h"

namespace fastattn {
namespace {

constexpr int FEW_TILES = 64;        // fewer tiles of queries than this are cut along the keys too
constexpr int SHORTEST_PART = 512;   // keys
constexpr int64_t THREAD = 1 << 18;   // multiply-adds that are worth another thread
constexpr int FEW_TASKS = 32;        // fewer key heads than this are cut along keys and queries in the backward
constexpr int MOST_KEY_GROUPS = 8;   // each holds a dq in fp32
constexpr int FEWEST_KEYS = 256;     // of a group
constexpr int FEWEST_TILES = 8;

int64_t tiles_of(const AttentionParams& p) {
  int64_t tiles = 0;
  for (const Sequence& s : p.sequences) tiles += s.S_q == 0 ? 0 : RowLayout{p.G(), s.S_q}.tiles();
  return tiles * p.H_kv;
}

// As many as there is work for: to wake a thread takes microseconds.
int worthwhile(const AttentionParams& p, int threads) {
  int64_t work = 0;
  for (const Sequence& s : p.sequences) work += int64_t(s.S_q) * s.S_k;
  work *= int64_t(p.H) * (p.D + p.D_v);
  return int(std::clamp<int64_t>(work / THREAD, 1, std::max(threads, 1)));
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
  threads = worthwhile(p, threads);
  const ForwardPlan plan = plan_forward(p, threads);
  FASTATTN_CALL(run_forward(p, plan, threads));
}

BackwardPlan plan_backward(const AttentionParams& p) {
  BackwardPlan plan;
  const int wanted = (FEW_TASKS + p.B * p.H_kv - 1) / (p.B * p.H_kv);  // tasks of a key head
  plan.first_tile.push_back(0);
  for (int b = 0; b < p.B; ++b) {
    const Sequence& s = p.sequences[b];
    const int tiles = s.S_q == 0 ? 0 : RowLayout{p.G(), s.S_q}.tiles();
    const int chunks = (s.S_k + FEWEST_KEYS - 1) / FEWEST_KEYS;
    const int key_cuts = std::min(wanted, MOST_KEY_GROUPS);
    const int keys = (chunks + key_cuts - 1) / key_cuts * FEWEST_KEYS;  // of a group
    const int key_groups = keys == 0 ? 0 : (s.S_k + keys - 1) / keys;
    const int cuts = key_groups == 0 ? 1 : std::clamp(wanted / key_groups, 1, std::max(1, tiles / FEWEST_TILES));
    const int group_tiles = std::max(1, (tiles + cuts - 1) / cuts);
    const int tile_groups = std::max(1, (tiles + group_tiles - 1) / group_tiles);
    plan.key_groups.push_back(key_groups);
    plan.tile_groups.push_back(tile_groups);
    plan.most_key_groups = std::max(plan.most_key_groups, key_groups);
    plan.most_tile_groups = std::max(plan.most_tile_groups, tile_groups);
    for (int h = 0; h < p.H_kv; ++h) {
      for (int i = 0; i < key_groups; ++i)
        for (int j = 0; j < tile_groups; ++j)
          plan.tasks.push_back({b, h, i * keys, std::min((i + 1) * keys, s.S_k), j * group_tiles,
                                std::min((j + 1) * group_tiles, tiles), i, j});
      plan.first_tile.push_back(plan.first_tile.back() + tiles);
    }
  }
  return plan;
}

namespace {

// (B, H): minus the sums of ds · distance
void sum_slopes(const AttentionParams& p, const BackwardPlan& plan, const float* by_row, float* dslopes) {
  std::vector<double> sums(size_t(p.B) * p.H, 0.0);
  for (int head = 0; head < p.B * p.H_kv; ++head) {
    const int b = head / p.H_kv, h_kv = head % p.H_kv;
    const RowLayout layout{p.G(), p.sequences[b].S_q};
    for (int64_t tile = plan.first_tile[head]; tile < plan.first_tile[head + 1]; ++tile)
      for (int group = 0; group < plan.key_groups[b]; ++group)
        for (int lane = 0; lane < BLOCK_M; ++lane) {
          const int index = int(tile - plan.first_tile[head]);
          const int g = layout.shared() ? (index * BLOCK_M + lane) / layout.S_q : index / layout.tiles_of_head();
          const float x = by_row[(group * plan.first_tile.back() + tile) * BLOCK_M + lane];
          if (g < layout.G) sums[size_t(b) * p.H + h_kv * layout.G + g] -= x;
        }
  }
  std::copy(sums.begin(), sums.end(), dslopes);
}

// (H,): -Σ exp(sink - lse - lse_low) delta
void sum_sinks(const AttentionParams& p, const RowSums& sums, float* dsinks) {
  for (int h = 0; h < p.H; ++h) {
    double sum = 0.0;
    for (int b = 0; b < p.B; ++b)
      for (int64_t i = 0, at = p.lse_index(b, h); i < p.sequences[b].S_q; ++i, ++at)
        sum -= std::exp(double(p.sinks[h]) - sums.lse[at] - sums.lse_low[at]) * sums.delta[at];
    dsinks[h] = float(sum);
  }
}

// The lse of rows that are few was summed in another order than the backward will, by which it computes probabilities:
// of large scores the difference would not be small. It is summed again, as that of other rows: without values.
void sum_again(const AttentionParams& p, float* lse, float* lse_low, int threads) {
  const int64_t rows = (p.packed ? 1 : p.B) * int64_t(p.H) * p.rows_q;
  std::copy_n(p.lse, rows, lse);
  std::copy_n(p.lse_low, rows, lse_low);
  AttentionParams scores = p;
  scores.lse = lse;
  scores.lse_low = lse_low;
  scores.D_v = 0;
  scores.dropout = false;
  scores.as_many = true;
  for (Sequence& s : scores.sequences)
    if (!p.few(s)) s.S_q = 0;
  attention_forward(scores, threads);
}

}  // namespace

void attention_backward(const AttentionParams& forward, const AttentionGradients& g, int threads) {
  AttentionParams p = forward;
  threads = worthwhile(p, threads);
  const auto few = [&](const Sequence& s) { return p.few(s); };
  const bool again = std::any_of(p.sequences.begin(), p.sequences.end(), few);
  const int64_t rows = (p.packed ? 1 : p.B) * int64_t(p.H) * p.rows_q;
  const Scratch summed(again ? sizeof(float) * 2 * size_t(rows) : 0);
  if (again) {
    p.lse = reinterpret_cast<float*>(summed.data());
    p.lse_low = p.lse + rows;
    sum_again(forward, p.lse, p.lse_low, threads);
  }
  const BackwardPlan plan = plan_backward(p);
  const int64_t tiles = plan.first_tile.back();
  const int64_t keys = (p.packed ? 1 : p.B) * int64_t(p.H_kv) * p.rows_k;
  const auto floats = [](bool wanted, int64_t n) { return Scratch(wanted ? size_t(n) * sizeof(float) : 0); };
  const bool several = plan.most_tile_groups > 1;
  const Scratch dq = floats(g.dq.data, plan.most_key_groups * tiles * p.D * BLOCK_M);
  const Scratch dk = floats(several && g.dk.data, plan.most_tile_groups * keys * p.D);
  const Scratch dv = floats(several && g.dv.data, plan.most_tile_groups * keys * p.D_v);
  const Scratch lse = floats(true, rows), lse_low = floats(true, rows), delta = floats(true, rows);
  const Scratch dslope = floats(g.dslopes, plan.most_key_groups * tiles * BLOCK_M);
  const auto at = [](const Scratch& s) { return reinterpret_cast<float*>(s.data()); };
  const RowSums sums{at(lse), at(lse_low), at(delta), at(dq), at(dslope), at(dk), at(dv)};
  AttentionGradients given = g;
  const int64_t full[4] = {p.B, p.H, p.rows_q, p.rows_k};
  given.dbias_is_ds = g.dbias != nullptr && !p.packed && p.softcap == 0.f && std::equal(full, full + 4, g.dbias_sizes);
  if (given.dbias_is_ds) std::fill_n(g.dbias, p.B * p.H * p.rows_q * p.rows_k, 0.f);  // what no row sees
  FASTATTN_CALL(run_backward(p, given, plan, sums, threads));
  if (g.dslopes != nullptr) sum_slopes(p, plan, sums.dslope, g.dslopes);
  if (g.dsinks != nullptr) sum_sinks(p, sums, g.dsinks);
  if (g.dbias != nullptr && !given.dbias_is_ds) FASTATTN_CALL(run_bias_gradient(p, g, sums, threads));
}

}  // namespace fastattn
