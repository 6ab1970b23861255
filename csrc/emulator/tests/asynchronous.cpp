// What may be done while TMA and wgmma are at work, and what their waits wait for.
#include <ptx/fence.h>
#include <ptx/mbarrier.h>
#include <ptx/named_barrier.h>
#include <ptx/numeric.h>
#include <ptx/shared.h>
#include <ptx/tma.h>
#include <ptx/warp.h>
#include <ptx/wgmma.h>
#include <tests/launching.h>

using namespace ptx;

namespace {

// Each warp stages its own rows of A, with no more than a warp_sync before the wgmma that reads them.
struct Staged { float* d; bool sync; };
void staged_by_warp_kernel(const Staged p) {
  const uint32_t a = dynamic_shared(), b = a + 8192;
  const int t = threadIdx.x, row = 16 * (t / 32) + t % 16, half = t % 32 / 16;  // A, B: 64 × 16, rows of 128 bytes
  for (int k = 8 * half; k < 8 * half + 8; ++k)
    st_shared(swizzle(b + 128 * row + 2 * k, Swizzle::B128), from_float<bf16>(1));
  fence_proxy_async();
  cta_sync();
  for (int k = 8 * half; k < 8 * half + 8; ++k)
    st_shared(swizzle(a + 128 * row + 2 * k, Swizzle::B128), from_float<bf16>(float(row)));
  fence_proxy_async();
  if (p.sync) warp_sync();
  float d[32];
  wgmma_fence();
  wgmma_ss<bf16, 0, 0>(d, descriptor(a, 16, 1024, Swizzle::B128), descriptor(b, 16, 1024, Swizzle::B128), 0);
  wgmma_commit();
  wgmma_wait<0>(d);
  if (t % 4 == 0)
    for (int r = 0; r < 2; ++r) p.d[16 * (t / 32) + t % 32 / 4 + 8 * r] = d[2 * r];
}

// One thread stages B and arrives at a barrier that the others wait for; it does not wait itself.
struct Result { float* d; };
void staged_by_one_thread_kernel(const Result p) {
  const uint32_t b = dynamic_shared(), bar = b + 8192;
  const int t = threadIdx.x;
  if (t == 0) mbarrier_init(bar, 1);
  cta_sync();
  if (t == 0) {
    for (int i = 0; i < 64 * 16; ++i)
      st_shared(swizzle(b + 128 * (i / 16) + 2 * (i % 16), Swizzle::B128), from_float<bf16>(1));
    fence_proxy_async();
    mbarrier_arrive(bar);
  } else {
    mbarrier_wait(bar, 0);
  }
  const uint32_t one = pack<bf16>(1, 1), a[4] = {one, one, one, one};
  float d[32];
  wgmma_fence();
  wgmma_rs<bf16, 0>(d, a, descriptor(b, 16, 1024, Swizzle::B128), 0);
  wgmma_commit();
  wgmma_wait<0>(d, a);
  for (int i = 0; i < 32; ++i) p.d[32 * t + i] = d[i];
}

// Thread 0 alone changes an accumulator while the wgmma is in flight.
void touched_by_one_thread_kernel(const Result) {
  const uint32_t b = dynamic_shared();
  const int t = threadIdx.x;
  for (int i = t; i < 4096; i += 128) st_shared(b + 2 * i, bf16{0});
  fence_proxy_async();
  cta_sync();
  const uint32_t a[4] = {};
  float d[32] = {};
  wgmma_fence();
  wgmma_rs<bf16, 0>(d, a, descriptor(b, 16, 1024, Swizzle::B128), 1);
  if (t == 0) d[5] = 1;
  wgmma_commit();
  wgmma_wait<0>(d, a);
}

struct Copy { TensorMap from, to; float* y; float* seen; bool only_reads, waits; };

// Copies 64 floats through shared memory and looks at the first after the wait.
void store_kernel(const Copy p) {
  const uint32_t tile = dynamic_shared(), bar = tile + 256;
  if (threadIdx.x) return;
  mbarrier_init(bar, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_tx(bar, 256);
  tma_load(tile, &p.from, bar, 0, 0);
  mbarrier_wait(bar, 0);
  tma_store(&p.to, tile, 0, 0);
  tma_store_commit();
  if (!p.waits) return;
  if (p.only_reads) tma_store_wait_read<0>();
  else tma_store_wait<0>();
  *p.seen = *p.y;
}

// Two loads of 256 bytes, and a barrier that expects one of them.
void half_expected_kernel(const Copy p) {
  const uint32_t tile = dynamic_shared(), bar = tile + 512;
  if (threadIdx.x) return;
  mbarrier_init(bar, 1);
  fence_mbarrier_init();
  tma_load(tile, &p.from, bar, 0, 0);
  tma_load(tile + 256, &p.from, bar, 0, 0);
  mbarrier_arrive_expect_tx(bar, 256);
  mbarrier_wait(bar, 0);
  *p.seen = ld_shared<float>(tile + 256);
}

struct Rows {
  alignas(16) float x[64], y[64];
  float seen = 0;

  Rows() {
    for (int i = 0; i < 64; ++i) x[i] = i + 1, y[i] = -1;
  }
  Copy copy(bool only_reads, bool waits) {
    const uint64_t sizes[] = {64, 1}, strides[] = {256};
    const uint32_t box[] = {64, 1};
    const auto map = [&](float* p) {
      return make_tensor_map(ElementType::Fp32, p, 2, sizes, strides, box, Swizzle::None);
    };
    return {map(x), map(y), y, &seen, only_reads, waits};
  }
};

}  // namespace

TEST(a_staged_by_each_warp) {
  std::vector<float> d(64);
  expect_clean(staged_by_warp_kernel, {dim3(1), 128, 16384}, Staged{d.data(), true}, [&] {
    for (int i = 0; i < 64; ++i) EXPECT_EQUAL(d[i], 16.f * i);
  });
  expect_finding(staged_by_warp_kernel, {dim3(1), 128, 16384}, Staged{d.data(), false}, "race: read after write");
}
TEST(b_staged_by_one_thread) {
  std::vector<float> d(32 * 128);
  expect_clean(staged_by_one_thread_kernel, {dim3(1), 128, 16384}, Result{d.data()}, [&] {
    for (float x : d) EXPECT_EQUAL(x, 16.f);
  });
}
TEST(accumulator_touched_by_one_thread) {
  expect_finding(touched_by_one_thread_kernel, {dim3(1), 128, 16384}, Result{}, "accumulator touched in flight");
}

TEST(store_wait) {
  Rows rows;
  expect_clean(store_kernel, {dim3(1), 32, 1024}, rows.copy(false, true), [&] {
    EXPECT_EQUAL(rows.seen, 1.f);
    EXPECT_EQUAL(rows.y[63], 64.f);
    rows.y[0] = rows.y[63] = -1;
  });
}
TEST(store_wait_read_is_not_for_the_writes) {
  Rows rows;
  const auto report = emulate(store_kernel, {dim3(1), 32, 1024}, rows.copy(true, true), {"tma_last", 0});
  EXPECT(report.clean());
  EXPECT_EQUAL(rows.seen, -1.f);
  EXPECT_EQUAL(rows.y[0], 1.f);
}
TEST(store_not_waited_for) {
  Rows rows;
  expect_finding(store_kernel, {dim3(1), 32, 1024}, rows.copy(false, false), "store not waited for");
}
TEST(half_expected) {
  for (const Schedule& schedule : SCHEDULES) {
    Rows rows;
    const auto report = emulate(half_expected_kernel, {dim3(1), 32, 1024}, rows.copy(false, true), schedule);
    EXPECT(!report.clean());
    if (std::string(schedule.name) == "tma_last") EXPECT(report.findings()[0].kind == "race: TMA load in flight");
  }
}

int main(int argc, char** argv) { return harness::main(argc, argv); }
