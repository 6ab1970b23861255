// Barriers, warps, clusters, atomics and the launcher, each in a kernel of a few lines.
#include <ptx/cluster.h>
#include <ptx/fence.h>
#include <ptx/global.h>
#include <ptx/mbarrier.h>
#include <ptx/named_barrier.h>
#include <ptx/shared.h>
#include <ptx/tma.h>
#include <ptx/warp.h>
#include <tests/launching.h>

#include <stdexcept>

using namespace ptx;

namespace {

struct Out { int* out; int n; };

// Thread 0 hands `n` numbers to warp 1 through one word and two mbarriers, phase after phase.
void mbarrier_phases_kernel(const Out p) {
  const uint32_t word = dynamic_shared(), full = word + 8, empty = full + 8;
  const int t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 32);
  }
  cta_sync();
  for (int i = 0; i < p.n; ++i) {
    if (t == 0) {
      mbarrier_wait(empty, (i & 1) ^ 1);  // passes at once for the first phase
      st_shared(word, 10 * i);
      mbarrier_arrive(full);
    } else if (t >= 32) {
      mbarrier_wait(full, i & 1);
      p.out[i * 32 + t - 32] = ld_shared<int>(word) + t;
      mbarrier_arrive(empty);
    }
  }
}

// Bytes may arrive before they are expected; the phase completes with the last of arrivals and bytes.
struct Early { TensorMap map; float* out; };
void bytes_before_expectation_kernel(const Early p) {
  const uint32_t tile = dynamic_shared(), bar = tile + 1024;
  const int t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(bar, 2);
    fence_mbarrier_init();
    tma_load(tile, &p.map, bar, 0, 0);
    mbarrier_arrive(bar);
    mbarrier_expect_tx(bar, 64 * 4);
    mbarrier_arrive(bar);
  }
  cta_sync();
  mbarrier_wait(bar, 0);
  p.out[t] = ld_shared<float>(tile + 4 * t);
}

void waits_for_ever_kernel(const Out) {
  const uint32_t bar = dynamic_shared();
  if (threadIdx.x == 0) mbarrier_init(bar, 33);
  cta_sync();
  mbarrier_arrive(bar);
  mbarrier_wait(bar, 0);
}

void overwrites_mbarrier_kernel(const Out) {
  const uint32_t bar = dynamic_shared();
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    st_shared(bar, 0);
  }
}

void too_many_bytes_kernel(const Out) {
  const uint32_t bar = dynamic_shared();
  if (threadIdx.x) return;
  mbarrier_init(bar, 2);
  mbarrier_arrive_expect_tx(bar, 1 << 20);
}

// Two warps take turns: warp w runs its turn between sync of barrier 1 + w and arrive at the other's.
void turns_kernel(const Out p) {
  const uint32_t counter = dynamic_shared();
  const int t = threadIdx.x, w = t / 32;
  if (t == 0) st_shared(counter, 0);
  cta_sync();
  if (w == 1) barrier_arrive(1, 64);  // warp 0 goes first
  for (int i = 0; i < p.n; ++i) {
    barrier_sync(1 + w, 64);
    const int turn = ld_shared<int>(counter);
    warp_sync();
    if (t % 32 == 0) st_shared(counter, turn + 1);
    p.out[(2 * i + w) * 32 + t % 32] = turn;
    if (w == 0 || i + 1 < p.n) barrier_arrive(1 + (w ^ 1), 64);
  }
}

void arrives_twice_kernel(const Out) {
  if (threadIdx.x >= 32) return;
  barrier_arrive(1, 64);
  barrier_arrive(1, 64);
}

// Warp 1 exits: cta_sync waits for those that have not.
void exited_threads_kernel(const Out p) {
  const int t = threadIdx.x;
  if (t >= 32) return;
  st_shared(dynamic_shared() + 4 * t, t);
  cta_sync();
  p.out[t] = ld_shared<int>(dynamic_shared() + 4 * (31 - t));
}

void warp_kernel(const Out p) {
  const int t = threadIdx.x, l = t % 32;
  const double d = shuffle_xor(t + 0.5, 3);
  const float f = shuffle(float(t), (l + 1) % 32);
  const uint32_t votes = ballot(l % 3 == 0);
  const int leader = elect_one();
  p.out[4 * t] = int(2 * d);
  p.out[4 * t + 1] = int(f);
  p.out[4 * t + 2] = int(votes);
  p.out[4 * t + 3] = leader;
}

// Lanes 16 … 31 exit: they do not vote any more.
void vote_after_exits_kernel(const Out p) {
  for (int i = 0; i < 2; ++i) ballot(true);
  if (threadIdx.x >= 16) return;
  p.out[threadIdx.x] = int(ballot(threadIdx.x != 3));
}

// A shuffle orders no memory.
void shuffle_for_a_sync_kernel(const Out p) {
  const int t = threadIdx.x;
  st_shared(dynamic_shared() + 4 * t, t);
  shuffle_xor(t, 1);
  p.out[t] = ld_shared<int>(dynamic_shared() + 4 * (t ^ 1));
}

// Warps 1 and 2 read a word, warp 0 writes it after a barrier with warp 2 alone.
void second_reader_kernel(const Out p) {
  const uint32_t word = dynamic_shared();
  const int t = threadIdx.x, warp = t / 32;
  if (t == 0) st_shared(word, 7);
  cta_sync();
  if (warp) p.out[t] = ld_shared<int>(word);
  if (warp != 1) barrier_sync(1, 64);
  if (t == 0) st_shared(word, 8);
}

// A persistent kernel: CTAs take numbered tiles from a counter in global memory.
struct Tiles { int* counter; int* owner; int n; };
void tiles_kernel(const Tiles p) {
  const uint32_t next = dynamic_shared();
  for (;;) {
    if (threadIdx.x == 0) st_shared(next, atomic_add(p.counter, 1));
    cta_sync();
    const int tile = ld_shared<int>(next);
    cta_sync();
    if (tile >= p.n) return;
    if (threadIdx.x == 0) p.owner[tile] = blockIdx.x;
  }
}

// CTA i adds up to i + 1 into float and unsigned counters; its threads are all of the warp.
struct Counters { float* sum; uint32_t* count; };
void counters_kernel(const Counters p) {
  atomic_add(p.sum, 0.5f);
  atomic_add(p.count, 1u);
}

// Threads share words but no bytes of them: thread t owns byte t, then 16-bit half t % 2 of a word, read and rewritten.
void neighbours_kernel(const Out p) {
  const uint32_t bytes = dynamic_shared(), halves = bytes + 64;
  const int t = threadIdx.x;
  st_shared<uint8_t>(bytes + t, t);
  st_shared<uint16_t>(halves + 2 * t, t);
  cta_sync();
  const int mine = ld_shared<uint16_t>(halves + 2 * t), other = ld_shared<uint16_t>(halves + 2 * (t ^ 1));
  cta_sync();
  if (t % 2) st_shared<uint16_t>(halves + 2 * (t ^ 1), 100 + t);  // rewrites the half of its neighbour, who has read it
  else p.out[64 + t] = ld_shared<uint16_t>(halves + 2 * (t ^ 1));  // while the neighbour's own half is read again
  uint32_t word = ld_shared<uint32_t>(bytes + t / 4 * 4);
  p.out[t] = mine + other + int(word >> 8 * (t % 4) & 0xff);
}

// The same, but thread 0 writes the half that thread 1 reads.
void neighbours_in_conflict_kernel(const Out p) {
  const uint32_t word = dynamic_shared();
  const int t = threadIdx.x;
  if (t == 0) st_shared(word, 0u);
  cta_sync();
  if (t == 0) st_shared<uint16_t>(word + 2, 1);
  if (t == 1) p.out[0] = ld_shared<uint16_t>(word + 2);
}

void ranks_kernel(const Out p) {
  const int cta = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) p.out[cta] = cluster_rank() * 100 + cluster_size();
}

// A ring: each CTA writes into its right neighbour, round by round, with arrive and wait of the cluster barrier apart.
void ring_kernel(const Out p) {
  const uint32_t word = dynamic_shared();
  const uint32_t rank = cluster_rank(), size = cluster_size();
  int value = int(blockIdx.x);
  cluster_sync();
  for (int i = 0; i < p.n; ++i) {
    if (threadIdx.x == 0) st_shared_cluster(word, (rank + 1) % size, value);
    cluster_arrive();
    cluster_wait();
    value = ld_shared<int>(word) + 1;
    cluster_sync();
  }
  if (threadIdx.x == 0) p.out[blockIdx.x] = value;
}

// Warp 1 of each CTA exits: the cluster's barrier waits for the others.
void cluster_after_exits_kernel(const Out p) {
  if (threadIdx.x >= 32) return;
  st_shared(dynamic_shared() + 4 * threadIdx.x, int(blockIdx.x));
  cluster_sync();
  p.out[blockIdx.x * 32 + threadIdx.x] = ld_shared_cluster<int>(dynamic_shared() + 4 * threadIdx.x, cluster_rank() ^ 1);
  cluster_sync();
}

void remote_after_exit_kernel(const Out p) {
  cluster_sync();
  if (cluster_rank() == 1) return;
  if (threadIdx.x == 0) p.out[0] = ld_shared_cluster<int>(dynamic_shared(), 1);
}

// CTA 0 waits for the flag that CTA 1 raises after its number.
struct Flag { int* flag; int* number; };
void flag_kernel(const Flag p) {
  if (blockIdx.x == 0) {
    while (!ld_global(p.flag)) continue;
    if (threadIdx.x == 0) st_global(p.number + 1, 2 * ld_global(p.number));
    return;
  }
  if (threadIdx.x == 0) {
    st_global(p.number, 21);
    thread_fence();
    atomic_add(p.flag, 1);
  }
}

// The flag is the last of four floats that CTA 1 adds by a bulk reduction.
struct Sum { float* sum; float* seen; };
void flag_by_reduction_kernel(const Sum p) {
  const uint32_t stage = dynamic_shared();
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    while (ld_global(p.sum + 3) == 0) continue;
    p.seen[t] = ld_global(p.sum + t % 4);
    return;
  }
  if (t < 4) st_shared(stage + 4 * t, float(t + 1));
  fence_proxy_async();
  cta_sync();
  if (t) return;
  bulk_reduce_add(p.sum, stage, 16);
  tma_store_commit();
  tma_store_wait<0>();
}

void waits_for_a_flag_that_nobody_raises_kernel(const Flag p) {
  while (!ld_global(p.flag)) continue;
}

void part_of_a_warpgroup_kernel(const Out) {
  if (threadIdx.x < 64) setmaxnreg_inc<240>();
}

void registers_kernel(const Out) {
  if (threadIdx.x < 128) setmaxnreg_inc<240>();
  else setmaxnreg_inc<232>();
}

}  // namespace

TEST(mbarrier_phases) {
  std::vector<int> out(7 * 32);
  expect_clean(mbarrier_phases_kernel, {dim3(1), 64, 64}, Out{out.data(), 7}, [&] {
    for (int i = 0; i < 7; ++i)
      for (int l = 0; l < 32; ++l) EXPECT_EQUAL(out[32 * i + l], 10 * i + 32 + l);
  });
}
TEST(mbarrier_bytes_before_expectation) {
  alignas(16) float x[64];
  for (int i = 0; i < 64; ++i) x[i] = i;
  const uint64_t sizes[] = {64, 1}, strides[] = {256};
  const uint32_t box[] = {64, 1};
  std::vector<float> out(64);
  const Early p{make_tensor_map(ElementType::Fp32, x, 2, sizes, strides, box, Swizzle::None), out.data()};
  expect_clean(bytes_before_expectation_kernel, {dim3(1), 64, 2048}, p, [&] {
    for (int i = 0; i < 64; ++i) EXPECT_EQUAL(out[i], float(i));
  });
}
TEST(mbarrier_deadlock) { expect_finding(waits_for_ever_kernel, {dim3(1), 32, 64}, Out{}, "deadlock"); }
TEST(mbarrier_overwritten) {
  expect_finding(overwrites_mbarrier_kernel, {dim3(1), 32, 64}, Out{}, "mbarrier overwritten");
}
TEST(mbarrier_too_many_bytes) {
  expect_finding(too_many_bytes_kernel, {dim3(1), 32, 64}, Out{}, "mbarrier: too many bytes");
}

TEST(named_barriers_take_turns) {
  std::vector<int> out(2 * 5 * 32);
  expect_clean(turns_kernel, {dim3(1), 64, 64}, Out{out.data(), 5}, [&] {
    for (int i = 0; i < 10; ++i)
      for (int l = 0; l < 32; ++l) EXPECT_EQUAL(out[32 * i + l], i);
  });
}
TEST(named_barrier_arrives_twice) {
  expect_finding(arrives_twice_kernel, {dim3(1), 64, 64}, Out{}, "named barrier: arrives twice");
}
TEST(cta_sync_after_exits) {
  std::vector<int> out(32);
  expect_clean(exited_threads_kernel, {dim3(1), 64, 128}, Out{out.data(), 0}, [&] {
    for (int t = 0; t < 32; ++t) EXPECT_EQUAL(out[t], 31 - t);
  });
}

TEST(warp_operations) {
  std::vector<int> out(4 * 64);
  expect_clean(warp_kernel, {dim3(1), 64, 0}, Out{out.data(), 0}, [&] {
    int votes = 0;
    for (int l = 0; l < 32; l += 3) votes |= 1 << l;
    for (int t = 0; t < 64; ++t) {
      EXPECT_EQUAL(out[4 * t], 2 * (t ^ 3) + 1);
      EXPECT_EQUAL(out[4 * t + 1], t / 32 * 32 + (t + 1) % 32);
      EXPECT_EQUAL(out[4 * t + 2], votes);
      EXPECT_EQUAL(out[4 * t + 3], int(t % 32 == 0));
    }
  });
}

TEST(votes_after_exits) {
  std::vector<int> out(16);
  expect_clean(vote_after_exits_kernel, {dim3(1), 32, 0}, Out{out.data(), 0}, [&] {
    for (int votes : out) EXPECT_EQUAL(votes, 0xfff7);
  });
}
TEST(shuffles_order_no_memory) {
  std::vector<int> out(32);
  expect_finding(shuffle_for_a_sync_kernel, {dim3(1), 32, 128}, Out{out.data(), 0}, "race: read after write");
}
TEST(every_reader_counts) {
  std::vector<int> out(96);
  for (const Schedule& schedule : SCHEDULES) {
    const auto report = emulate(second_reader_kernel, {dim3(1), 96, 64}, Out{out.data(), 0}, schedule);
    EXPECT(report.findings().size() == 1 && report.findings()[0].kind.find("race") == 0);
  }
}

TEST(tiles_from_a_counter) {
  int counter = 0;
  std::vector<int> owner(40, -1);
  emulator::set_sm_count(3);
  expect_clean(tiles_kernel, {dim3(3), 32, 64}, Tiles{&counter, owner.data(), 40}, [&] {
    std::vector<int> of(3);
    for (int o : owner) {
      EXPECT(o >= 0 && o < 3);
      if (o >= 0 && o < 3) ++of[o];
    }
    for (int n : of) EXPECT(n > 5);  // they ran side by side
    EXPECT_EQUAL(counter, 43);
    counter = 0;
    owner.assign(40, -1);
  });
  emulator::set_sm_count(4);
}
TEST(more_ctas_than_sms) {
  float sum = 0;
  uint32_t count = 0;
  expect_clean(counters_kernel, {dim3(5, 3, 2), 32, 0}, Counters{&sum, &count}, [&] {
    EXPECT_EQUAL(count, 960u);
    EXPECT_EQUAL(sum, 480.f);
    sum = 0;
    count = 0;
  });
}

TEST(neighbouring_bytes) {
  std::vector<int> out(128);
  expect_clean(neighbours_kernel, {dim3(1), 64, 256}, Out{out.data(), 0}, [&] {
    for (int t = 0; t < 64; ++t) EXPECT_EQUAL(out[t], t + (t ^ 1) + t);
  });
  for (const Schedule& schedule : SCHEDULES) {  // which of the two comes first depends on the schedule
    const auto report = emulate(neighbours_in_conflict_kernel, {dim3(1), 64, 256}, Out{out.data(), 0}, schedule);
    EXPECT(report.findings().size() == 1 && report.findings()[0].kind.find("race") == 0);
  }
}
TEST(cluster_ranks) {
  std::vector<int> out(8 * 3 * 2);
  expect_clean(ranks_kernel, {dim3(8, 3, 2), 32, 0, 4}, Out{out.data(), 0}, [&] {
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQUAL(out[i], int(i % 8 % 4) * 100 + 4);
  });
}
TEST(cluster_ring) {
  std::vector<int> out(16);
  expect_clean(ring_kernel, {dim3(16), 32, 64, 8}, Out{out.data(), 8}, [&] {
    for (int i = 0; i < 16; ++i) EXPECT_EQUAL(out[i], i + 8);  // once round, one more at each step
  });
}
TEST(cluster_sync_after_exits) {
  std::vector<int> out(4 * 32);
  expect_clean(cluster_after_exits_kernel, {dim3(4), 64, 128, 2}, Out{out.data(), 0}, [&] {
    for (int i = 0; i < 128; ++i) EXPECT_EQUAL(out[i], i / 32 ^ 1);
  });
}
TEST(remote_after_exit) {
  int out = 0;
  for (const Schedule& schedule : SCHEDULES) {
    const auto report = emulate(remote_after_exit_kernel, {dim3(2), 32, 64, 2}, Out{&out, 0}, schedule);
    EXPECT(report.text().find("exit") != std::string::npos);
  }
}
TEST(flags_in_global_memory) {
  int flag = 0, number[2] = {};
  expect_clean(flag_kernel, {dim3(2), 32, 0}, Flag{&flag, number}, [&] {
    EXPECT_EQUAL(number[1], 42);
    flag = 0;
  });
}
TEST(flag_by_a_reduction) {
  alignas(16) float sum[4] = {};
  std::vector<float> seen(32);
  expect_clean(flag_by_reduction_kernel, {dim3(2), 32, 64}, Sum{sum, seen.data()}, [&] {
    for (int t = 0; t < 32; ++t) EXPECT_EQUAL(seen[t], float(t % 4 + 1));
    std::fill(sum, sum + 4, 0.f);
  });
}
TEST(flag_that_nobody_raises) {
  int flag = 0;
  expect_finding(waits_for_a_flag_that_nobody_raises_kernel, {dim3(1), 1, 0}, Flag{&flag, nullptr}, "deadlock");
}
TEST(registers_by_part_of_a_warpgroup) {
  expect_finding(part_of_a_warpgroup_kernel, {dim3(1), 128, 0}, Out{}, "setmaxnreg: not by the whole warpgroup");
}
TEST(register_budget) {
  expect_finding(registers_kernel, {dim3(1), 384, 0}, Out{}, "setmaxnreg: too many registers");
}

TEST(refused_launches) {
  const auto refusal = [](const LaunchShape& shape) {
    try {
      launch(registers_kernel, shape, nullptr, Out{});
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT(refusal({dim3(1), 2048, 0}).find("2048 threads") != std::string::npos);
  EXPECT(refusal({dim3(1), 32, 300 << 10}).find("shared memory") != std::string::npos);
  EXPECT(refusal({dim3(3), 32, 0, 2}).find("not a multiple of the cluster") != std::string::npos);
  EXPECT(refusal({dim3(1), 384, 0}).find("setmaxnreg") != std::string::npos);
}
TEST(refused_tensor_maps) {
  alignas(16) static uint16_t x[64 * 64];
  const auto refusal = [](int rank, uint64_t stride, uint32_t columns, Swizzle s) {
    const uint64_t sizes[] = {64, 64}, strides[] = {stride};
    const uint32_t box[] = {columns, 8};
    try {
      make_tensor_map(ElementType::Bf16, x, rank, sizes, strides, box, s);
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT(refusal(2, 128, 64, Swizzle::B128).empty());
  EXPECT(refusal(6, 128, 64, Swizzle::B128).find("rank") != std::string::npos);
  EXPECT(refusal(2, 120, 64, Swizzle::B128).find("strides") != std::string::npos);
  EXPECT(refusal(2, 128, 64, Swizzle::B64).find("wider than the swizzle") != std::string::npos);
  EXPECT(refusal(2, 128, 4, Swizzle::None).find("row") != std::string::npos);
}

int main(int argc, char** argv) { return harness::main(argc, argv); }
