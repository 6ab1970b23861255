// Kernels with a mistake each, in every schedule, and correct ones under many seeds. A case is named kernel.mistake.
//   planted run CASE      a line per schedule: its name, the findings as kind@file:line, wrong or right; between tabs
//   planted text CASE     what is reported in the eager schedule
//   planted seeds N CASE  the random schedule with seeds 0 … N-1, expecting a right result and no finding
#include <tests/cluster_kernels.h>
#include <tests/launching.h>
#include <tests/pipeline.h>
#include <tests/row_kernels.h>

#include <cstdlib>
#include <functional>
#include <random>

namespace {

struct Outcome {
  emulator::Report report;
  bool wrong;
};

struct Case {
  std::string name;  // kernel.bug
  std::function<Outcome(const Schedule&)> run;
};

std::vector<float> small_integers(size_t n, int most) {
  std::mt19937 random(7);
  std::vector<float> x(n);
  for (float& e : x) e = float(int(random() % (2 * most + 1)) - most);
  return x;
}

template <class T> std::vector<T> convert(const std::vector<float>& x) {
  std::vector<T> y;
  for (float e : x) y.push_back(ptx::from_float<T>(e));
  return y;
}

ptx::TensorMap matrix(std::vector<ptx::bf16>& x, uint64_t columns, uint32_t rows_of_box,
                      ptx::Swizzle swizzle = ptx::Swizzle::B128) {
  const uint64_t sizes[] = {columns, x.size() / columns}, strides[] = {2 * columns};
  const uint32_t box[] = {swizzle == ptx::Swizzle::B64 ? 32u : 64u, rows_of_box};
  return ptx::make_tensor_map(ptx::ElementType::Bf16, x.data(), 2, sizes, strides, box, swizzle);
}

template <pipeline::Bug BUG> Outcome run_pipeline(const Schedule& schedule) {
  using namespace pipeline;
  constexpr int tiles = 3, blocks = 5, ctas = 2;
  // |S| ≤ 64 is exact in bf16, and so are sums of products in fp32; o is rounded once
  const auto fq = small_integers(tiles * M * D, 1), fk = small_integers(blocks * N * D, 1);
  const auto fv = small_integers(blocks * N * D_V, 2);
  auto q = convert<ptx::bf16>(fq), k = convert<ptx::bf16>(fk), v = convert<ptx::bf16>(fv);
  std::vector<ptx::bf16> o(tiles * M * D_V, ptx::bf16{0xffff});
  Params p{matrix(q, D, M), matrix(k, D, N, BUG == Bug::WrongSwizzle ? ptx::Swizzle::None : ptx::Swizzle::B128),
           matrix(v, D_V, N), matrix(o, D_V, M), tiles, blocks};
  if (BUG == Bug::WrongSwizzle) p.k.swizzle = ptx::Swizzle::B64;  // the driver's check of the box stands aside here
  Outcome outcome{emulate(kernel<BUG>, {dim3(ctas), THREADS, SHARED}, p, schedule), false};
  static std::vector<uint16_t> expected;
  if (expected.empty()) {
    for (int m = 0; m < tiles * M; ++m) {
      std::vector<float> row(D_V);
      for (int n = 0; n < blocks * N; ++n) {
        float s = 0;
        for (int d = 0; d < D; ++d) s += fq[m * D + d] * fk[n * D + d];
        for (int d = 0; d < D_V; ++d) row[d] += s * fv[n * D_V + d];
      }
      for (float x : row) expected.push_back(ptx::from_float<ptx::bf16>(x).bits);
    }
  }
  for (size_t i = 0; i < expected.size(); ++i) outcome.wrong |= o[i].bits != expected[i];
  return outcome;
}

template <clusters::Bug BUG, bool PUSH> Outcome run_cluster_sum(const Schedule& schedule) {
  using namespace clusters;
  constexpr int n = 3;
  const auto x = small_integers(n * CTAS * THREADS, 50);
  std::vector<float> y(n * CTAS, NAN);
  Outcome outcome{emulate(PUSH ? push<BUG> : pull<BUG>, {dim3(n * CTAS), THREADS, 4 * CTAS * THREADS + 8, CTAS},
                          SumParams{x.data(), y.data()}, schedule), false};
  for (int c = 0; c < n * CTAS; ++c) {
    float sum = 0;
    for (int i = 0; i < CTAS * THREADS; ++i) sum += x[c / CTAS * CTAS * THREADS + i];
    outcome.wrong |= y[c] != sum;
  }
  return outcome;
}
template <clusters::Bug BUG> Outcome run_pull(const Schedule& s) { return run_cluster_sum<BUG, false>(s); }
template <clusters::Bug BUG> Outcome run_push(const Schedule& s) { return run_cluster_sum<BUG, true>(s); }

template <clusters::Bug BUG> Outcome run_multicast(const Schedule& schedule) {
  using namespace clusters;
  constexpr int tiles = 5;
  auto x = small_integers(tiles * ROWS * COLUMNS, 50);
  std::vector<float> y(PAIR * COLUMNS, NAN);
  const uint64_t sizes[] = {COLUMNS, tiles * ROWS}, strides[] = {4 * COLUMNS};
  const uint32_t box[] = {COLUMNS, ROWS / 2};
  const auto map = ptx::make_tensor_map(ptx::ElementType::Fp32, x.data(), 2, sizes, strides, box, ptx::Swizzle::None);
  Outcome outcome{emulate(multicast<BUG>, {dim3(PAIR), 64, STAGES * TILE + 64, PAIR},
                          MulticastParams{map, y.data(), tiles}, schedule), false};
  for (int column = 0; column < COLUMNS; ++column) {
    float sum = 0;
    for (int row = 0; row < tiles * ROWS; ++row) sum += x[row * COLUMNS + column];
    for (int cta = 0; cta < PAIR; ++cta) outcome.wrong |= y[cta * COLUMNS + column] != sum;
  }
  return outcome;
}

template <rows::Bug BUG> Outcome run_row_sum(const Schedule& schedule) {
  using namespace rows;
  constexpr int n = 3;
  const auto x = small_integers(n * THREADS, 50);
  std::vector<float> y(n, NAN);
  Outcome outcome{emulate(sum<BUG>, {dim3(1), THREADS, 64}, SumParams{x.data(), y.data(), n}, schedule), false};
  for (int row = 0; row < n; ++row) {
    float total = 0;
    for (int i = 0; i < THREADS; ++i) total += x[row * THREADS + i];
    outcome.wrong |= y[row] != total;
  }
  return outcome;
}

template <rows::Bug BUG> Outcome run_transpose(const Schedule& schedule) {
  const auto x = small_integers(128, 50);
  std::vector<float> y(128, NAN);
  Outcome outcome{emulate(rows::transpose<BUG>, {dim3(1), 32, 512}, rows::TransposeParams{x.data(), y.data()},
                          schedule), false};
  for (int i = 0; i < 128; ++i) outcome.wrong |= y[i] != x[i % 32 * 4 + i / 32];
  return outcome;
}

template <rows::Bug BUG> Outcome run_accumulate(const Schedule& schedule) {
  using namespace rows;
  constexpr int ctas = 3, n = 3;
  const auto x = small_integers(ctas * n * THREADS, 50);
  alignas(16) float y[THREADS] = {};
  Outcome outcome{emulate(accumulate<BUG>, {dim3(ctas), THREADS, 4 * THREADS}, AccumulateParams{x.data(), y, n},
                          schedule), false};
  for (int i = 0; i < THREADS; ++i) {
    float total = 0;
    for (int row = 0; row < ctas * n; ++row) total += x[row * THREADS + i];
    outcome.wrong |= y[i] != total;
  }
  return outcome;
}

#define CASE(kernel, name_space, bug) Case{#kernel "." #bug, run_##kernel<name_space::Bug::bug>}
#define PIPELINE(bug) CASE(pipeline, pipeline, bug)

const std::vector<Case> CASES = {
    PIPELINE(None),
    CASE(pull, clusters, None),
    CASE(push, clusters, None),
    CASE(multicast, clusters, None),
    CASE(row_sum, rows, None),
    CASE(transpose, rows, None),
    CASE(accumulate, rows, None),
    PIPELINE(NoFullWait),
    PIPELINE(NoEmptyWait),
    PIPELINE(WrongParity),
    PIPELINE(NoWgmmaWait),
    PIPELINE(EarlyRelease),
    PIPELINE(NoWgmmaFence),
    PIPELINE(TouchAccumulator),
    PIPELINE(RepackInFlight),
    PIPELINE(UnpinnedAccumulator),
    PIPELINE(WrongSbo),
    PIPELINE(WrongLbo),
    PIPELINE(WrongMajor),
    PIPELINE(WrongSwizzle),
    PIPELINE(ExpectTooSmall),
    PIPELINE(ExpectTooLarge),
    PIPELINE(TooManyArrivals),
    PIPELINE(NoProxyFence),
    PIPELINE(NoEpilogueBarrier),
    PIPELINE(NoStoreWait),
    PIPELINE(NoStoreCommit),
    PIPELINE(NoInitSync),
    PIPELINE(NoInitFence),
    PIPELINE(LoadNeverWaitedFor),
    CASE(pull, clusters, NoSync),
    CASE(pull, clusters, NoLastSync),
    CASE(push, clusters, NoFirstSync),
    CASE(push, clusters, NoSync),
    CASE(push, clusters, NoRemoteArrival),
    CASE(push, clusters, WrongRank),
    CASE(multicast, clusters, NoFirstSync),
    CASE(multicast, clusters, NoLastSync),
    CASE(multicast, clusters, NoPeerArrival),
    CASE(multicast, clusters, NoPeerCount),
    CASE(multicast, clusters, WrongMask),
    CASE(multicast, clusters, ExpectHalf),
    CASE(row_sum, rows, NoFirstSync),
    CASE(row_sum, rows, NoSecondSync),
    CASE(row_sum, rows, ReadsUnwritten),
    CASE(row_sum, rows, OutOfRange),
    CASE(row_sum, rows, Misaligned),
    CASE(row_sum, rows, DivergentShuffle),
    CASE(row_sum, rows, BarrierCount),
    CASE(transpose, rows, NoWarpSync),
    CASE(accumulate, rows, NoProxyFence),
    CASE(accumulate, rows, NoBarrier),
    CASE(accumulate, rows, NoStoreWait),
};

const Case& find(const std::string& name) {
  for (const Case& c : CASES)
    if (c.name == name) return c;
  std::printf("there is no case %s\n", name.c_str());
  std::exit(2);
}

int run(const Case& c) {
  for (const Schedule& schedule : SCHEDULES) {
    const Outcome outcome = c.run(schedule);
    std::printf("%s\t", schedule.name);
    const char* separator = "";
    for (const auto& f : outcome.report.findings()) {
      std::printf("%s%s@%s", separator, f.kind.c_str(), to_string(f.where).c_str());
      separator = "; ";
    }
    std::printf("\t%s\n", outcome.wrong ? "wrong" : "right");
  }
  return 0;
}

int seeds(const Case& c, uint64_t n) {
  for (uint64_t seed = 0; seed < n; ++seed) {
    const Outcome outcome = c.run({"random", seed});
    if (outcome.report.clean() && !outcome.wrong) continue;
    harness::fail(__FILE__, __LINE__, c.name + ", seed " + std::to_string(seed) + ": " + outcome.report.text() +
                                          (outcome.wrong ? "the result is wrong" : ""));
  }
  return harness::failures != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc == 3 && what == "run") return run(find(argv[2]));
  if (argc == 3 && what == "text") return std::printf("%s", find(argv[2]).run(SCHEDULES[0]).report.text().c_str()) < 0;
  if (argc == 4 && what == "seeds") return seeds(find(argv[3]), std::strtoull(argv[2], nullptr, 10));
  std::printf("planted run CASE, planted text CASE or planted seeds N CASE\n");
  return 2;
}
