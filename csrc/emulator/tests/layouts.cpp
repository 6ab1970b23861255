// Where operands, fragments and boxes lie, against formulas written down a second time.
#include <ptx/fence.h>
#include <ptx/matrix.h>
#include <ptx/mbarrier.h>
#include <ptx/named_barrier.h>
#include <ptx/numeric.h>
#include <ptx/shared.h>
#include <ptx/tma.h>
#include <ptx/warp.h>
#include <ptx/wgmma.h>
#include <tests/launching.h>

#include <random>

using namespace ptx;

namespace {

constexpr int M = 64, K = 16;

// The canonical layouts of the PTX manual, on byte offsets from the operand's start: chunks of 16 bytes within rows of
// `width` bytes, 8 rows an atom, and the chunk index XORed with the row's.
uint32_t reference_address(uint32_t start, bool mn_major, Swizzle s, uint32_t lbo, uint32_t sbo, int mn, int k) {
  const uint32_t width = s == Swizzle::B128 ? 128 : s == Swizzle::B64 ? 64 : s == Swizzle::B32 ? 32 : 16;
  const uint32_t contiguous = mn_major ? mn : k, strided = mn_major ? k : mn;
  uint32_t atom, row = strided % 8, byte;
  if (s == Swizzle::None) {
    byte = contiguous % 8 * 2;
    // cores of 8 × 16 bytes: K-major, lbo between cores along k; MN-major, sbo between cores along mn
    atom = mn_major ? contiguous / 8 * sbo + strided / 8 * lbo : contiguous / 8 * lbo + strided / 8 * sbo;
    return start + atom + row * 16 + byte;
  }
  const uint32_t elements = width / 2;
  if (mn_major) {
    atom = contiguous / elements * lbo + strided / 8 * sbo;
    byte = contiguous % elements * 2;
  } else {
    atom = strided / 8 * sbo;
    byte = contiguous * 2;
  }
  const uint32_t linear = start + atom + row * width + byte;
  const uint32_t rows_in_pattern = width / 16;  // the pattern of 128-byte lines repeats after 8, 4, 2 of them
  const uint32_t line = linear / 128 % rows_in_pattern, chunk = linear / 16 % rows_in_pattern;
  const uint32_t chunk_mask = rows_in_pattern - 1;
  return linear - chunk * 16 + ((chunk ^ line) & chunk_mask) * 16;
}

struct WgmmaCase {
  float* d;           // [64][N]
  const uint16_t* a;  // [64][16]
  const uint16_t* b;  // [N][16]
  Swizzle swizzle;
  uint32_t a_lbo, a_sbo, b_lbo, b_sbo;
};

constexpr uint32_t B_OFFSET = 32 << 10;

// Scatters a and b by the reference formula, multiplies, gathers the accumulators by the fragment formula.
template <class E, int N, int TRANS_A, int TRANS_B, bool RS> void wgmma_kernel(const WgmmaCase p) {
  const uint32_t shared = dynamic_shared();
  const int t = threadIdx.x;
  for (int i = t; i < M * K; i += 128)
    st_shared(reference_address(shared, TRANS_A, p.swizzle, p.a_lbo, p.a_sbo, i / K, i % K), p.a[i]);
  for (int i = t; i < N * K; i += 128)
    st_shared(reference_address(shared + B_OFFSET, TRANS_B, p.swizzle, p.b_lbo, p.b_sbo, i / K, i % K), p.b[i]);
  fence_proxy_async();
  cta_sync();
  float d[N / 2];
  uint32_t a[4];
  for (int j = 0; j < 4; ++j) {
    const int row = 16 * (t / 32) + t % 32 / 4 + (j % 2 ? 8 : 0), k = t % 4 * 2 + (j / 2 ? 8 : 0);
    a[j] = p.a[row * K + k] | uint32_t(p.a[row * K + k + 1]) << 16;
  }
  for (float& x : d) x = 1.f;
  const uint64_t a_descriptor = descriptor(shared, p.a_lbo, p.a_sbo, p.swizzle);
  const uint64_t b_descriptor = descriptor(shared + B_OFFSET, p.b_lbo, p.b_sbo, p.swizzle);
  wgmma_fence();
  if constexpr (RS) wgmma_rs<E, TRANS_B>(d, a, b_descriptor, 1);
  else wgmma_ss<E, TRANS_A, TRANS_B>(d, a_descriptor, b_descriptor, 1);
  wgmma_commit();
  wgmma_wait<0>(d, a);
  for (int i = 0; i < N / 2; ++i) {
    const int row = 16 * (t / 32) + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + t % 4 * 2 + i % 2;
    p.d[row * N + column] = d[i];
  }
}

template <class E, int N, int TRANS_A, int TRANS_B, bool RS> void check_wgmma(Swizzle s) {
  std::mt19937 random(1);
  std::vector<uint16_t> a(M * K), b(N * K);
  for (auto* x : {&a, &b})
    for (uint16_t& e : *x) e = from_float<E>(float(int(random() % 17) - 8) / 4).bits;
  std::vector<float> d(M * N);
  WgmmaCase p{d.data(), a.data(), b.data(), s, 0, 0, 0, 0};
  const uint32_t width = swizzle_width(s);
  const auto strides = [&](bool mn_major, uint32_t& lbo, uint32_t& sbo) {
    if (s == Swizzle::None) {  // cores one after another: along mn first
      lbo = mn_major ? 8192 : 4096 + 128;
      sbo = 128;
    } else {
      sbo = 8 * width;
      lbo = mn_major ? 2 * 8 * width + 8 * width : 16;  // two groups of 8 k, and a gap
    }
  };
  strides(TRANS_A, p.a_lbo, p.a_sbo);
  strides(TRANS_B, p.b_lbo, p.b_sbo);
  expect_clean(wgmma_kernel<E, N, TRANS_A, TRANS_B, RS>, {dim3(1), 128, 64 << 10}, p, [&] {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        float sum = 1;
        for (int k = 0; k < K; ++k) sum += to_float(E{a[m * K + k]}) * to_float(E{b[n * K + k]});
        EXPECT_EQUAL(d[m * N + n], sum);
      }
  });
}

template <class E, int N> void check_operands(Swizzle s) {
  check_wgmma<E, N, 0, 0, false>(s);
  check_wgmma<E, N, 0, 1, false>(s);
  check_wgmma<E, N, 1, 0, false>(s);
  check_wgmma<E, N, 1, 1, false>(s);
  check_wgmma<E, N, 0, 0, true>(s);
  check_wgmma<E, N, 0, 1, true>(s);
}

}  // namespace

TEST(descriptors_128) {
  check_operands<bf16, 128>(Swizzle::B128);
  check_operands<fp16, 128>(Swizzle::B128);
}
TEST(descriptors_64) { check_operands<bf16, 64>(Swizzle::B64); }
TEST(descriptors_32) { check_operands<fp16, 64>(Swizzle::B32); }
TEST(descriptors_unswizzled) { check_operands<bf16, 64>(Swizzle::None); }
TEST(every_width_of_n) {
  check_wgmma<bf16, 8, 0, 0, false>(Swizzle::B128);
  check_wgmma<bf16, 24, 0, 0, true>(Swizzle::B128);
  check_wgmma<fp16, 176, 0, 0, false>(Swizzle::B128);
  check_wgmma<bf16, 192, 0, 1, true>(Swizzle::B128);
  check_wgmma<bf16, 256, 0, 0, false>(Swizzle::B128);
}

namespace {

struct MatrixCase { uint16_t* out; };
const LaunchShape ONE_WARP{dim3(1), 32, 1024};

// Element (i, j) of the 16 × 16 tile is 16 i + j; rows of 64 bytes, so that lanes' addresses are not contiguous.
template <bool TRANSPOSED> void ldmatrix_kernel(const MatrixCase p) {
  const uint32_t shared = dynamic_shared();
  const int l = threadIdx.x;
  for (int i = l; i < 256; i += 32) st_shared<uint16_t>(shared + i / 16 * 64 + i % 16 * 2, i);
  warp_sync();
  uint32_t r[4];
  const uint32_t address = shared + (l % 16) * 64 + l / 16 * 16;  // matrices: rows 0-7 | 8-15, then columns 8-15
  if constexpr (TRANSPOSED) ldmatrix_x4_trans(r, address);
  else ldmatrix_x4(r, address);
  for (int m = 0; m < 4; ++m)
    for (int e = 0; e < 2; ++e) p.out[(m * 32 + l) * 2 + e] = r[m] >> (16 * e);
}

template <bool TRANSPOSED> void stmatrix_kernel(const MatrixCase p) {
  const uint32_t shared = dynamic_shared();
  const int l = threadIdx.x;
  uint32_t r[4];
  for (int m = 0; m < 4; ++m) r[m] = (m * 64 + 2 * l) | (m * 64 + 2 * l + 1) << 16;  // value: 64 m + 2 lane + half
  const uint32_t address = shared + (l % 16) * 64 + l / 16 * 16;
  if constexpr (TRANSPOSED) stmatrix_x4_trans(address, r[0], r[1], r[2], r[3]);
  else stmatrix_x4(address, r[0], r[1], r[2], r[3]);
  warp_sync();
  for (int i = l; i < 256; i += 32) p.out[i] = ld_shared<uint16_t>(shared + i / 16 * 64 + i % 16 * 2);
}

}  // namespace

TEST(ldmatrix_fragments) {
  std::vector<uint16_t> out(256);
  for (bool transposed : {false, true})
    expect_clean(transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, ONE_WARP, MatrixCase{out.data()}, [&] {
      for (int m = 0; m < 4; ++m)
        for (int l = 0; l < 32; ++l)
          for (int e = 0; e < 2; ++e) {
            int row = l / 4, column = 2 * (l % 4) + e;
            if (transposed) std::swap(row, column);
            EXPECT_EQUAL(int(out[(m * 32 + l) * 2 + e]), 16 * (row + 8 * (m % 2)) + column + 8 * (m / 2));
          }
    });
}

TEST(stmatrix_fragments) {
  std::vector<uint16_t> out(256);
  for (bool transposed : {false, true})
    expect_clean(transposed ? stmatrix_kernel<true> : stmatrix_kernel<false>, ONE_WARP, MatrixCase{out.data()}, [&] {
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) {
          const int m = i / 8 + 2 * (j / 8), row = transposed ? j % 8 : i % 8, column = transposed ? i % 8 : j % 8;
          EXPECT_EQUAL(int(out[16 * i + j]), 64 * m + 2 * (4 * row + column / 2) + column % 2);
        }
    });
}

namespace {

constexpr int RANK = 4;
constexpr int64_t SIZES[RANK] = {40, 5, 3, 2};
constexpr uint32_t BOX[RANK] = {32, 4, 2, 2};  // rows of 64 bytes
constexpr int64_t ROW = 48, PLANE = 5 * 48 + 8, CUBE = 3 * PLANE + 16;  // elements between neighbours: gaps everywhere
constexpr int BOX_ELEMENTS = 32 * 4 * 2 * 2;

struct BoxCase {
  TensorMap from, to;
  int c[RANK];
  uint16_t* shared;  // [2][2][4][32], what lay in shared memory
  Swizzle swizzle;
};

void box_kernel(const BoxCase p) {
  const uint32_t shared = dynamic_shared(), bar = shared + 4096;
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, BOX_ELEMENTS * 2);
    tma_load(shared, &p.from, bar, p.c[0], p.c[1], p.c[2], p.c[3]);
  }
  cta_sync();
  mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < BOX_ELEMENTS; i += 32)
    p.shared[i] = ld_shared<uint16_t>(swizzle(shared + 2 * i, p.swizzle));
  cta_sync();
  if (threadIdx.x == 0) {
    tma_store(&p.to, shared, p.c[0], p.c[1], p.c[2], p.c[3]);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

void check_box(Swizzle s, int c0, int c1, int c2, int c3) {
  std::vector<uint16_t> from(2 * CUBE), to(2 * CUBE, 0xffff), shared(BOX_ELEMENTS);
  for (size_t i = 0; i < from.size(); ++i) from[i] = i + 1;
  const uint64_t sizes[] = {40, 5, 3, 2}, strides[] = {ROW * 2, PLANE * 2, CUBE * 2};
  const auto map = [&](std::vector<uint16_t>& x) {
    return make_tensor_map(ElementType::Bf16, x.data(), RANK, sizes, strides, BOX, s);
  };
  const BoxCase p{map(from), map(to), {c0, c1, c2, c3}, shared.data(), s};
  expect_clean(box_kernel, {dim3(1), 32, 8192}, p, [&] {
    std::vector<uint16_t> expected_to(to.size(), 0xffff);
    int i = 0;
    for (int w = c3; w < c3 + 2; ++w)
      for (int z = c2; z < c2 + 2; ++z)
        for (int y = c1; y < c1 + 4; ++y)
          for (int x = c0; x < c0 + 32; ++x, ++i) {
            const bool inside = x >= 0 && x < SIZES[0] && y >= 0 && y < SIZES[1] && z >= 0 && z < SIZES[2] && w >= 0 &&
                                w < SIZES[3];
            const int64_t at = x + y * ROW + z * PLANE + w * CUBE;
            EXPECT_EQUAL(int(shared[i]), inside ? int(from[at]) : 0);
            if (inside) expected_to[at] = from[at];
          }
    EXPECT(to == expected_to);
    std::fill(to.begin(), to.end(), 0xffff);
  });
}

}  // namespace

TEST(boxes_inside) { check_box(Swizzle::B64, 8, 1, 0, 0); }
TEST(boxes_at_the_far_edges) {
  for (Swizzle s : {Swizzle::None, Swizzle::B64, Swizzle::B128}) check_box(s, 24, 3, 2, 1);
}
TEST(boxes_at_the_near_edges) { check_box(Swizzle::B64, -8, -1, -1, -1); }
TEST(boxes_wholly_outside) { check_box(Swizzle::B64, 40, 0, 0, 0); }

namespace {

struct RankCase { TensorMap from, to; float* shared; };

// A box of 4 × 2 × … × 2 floats at 0, 1, …, 1: to shared memory, out for the test, and on to another tensor.
template <int R> void rank_kernel(const RankCase p) {
  const uint32_t shared = dynamic_shared(), bar = shared + 512;
  constexpr int elements = 4 << (R - 1);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, 4 * elements);
    if constexpr (R == 2) tma_load(shared, &p.from, bar, 0, 1, L2Hint::EvictFirst);
    if constexpr (R == 3) tma_load(shared, &p.from, bar, 0, 1, 1);
    if constexpr (R == 5) tma_load(shared, &p.from, bar, 0, 1, 1, 1, 1, L2Hint::EvictLast);
  }
  cta_sync();
  mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < elements; i += 32) p.shared[i] = ld_shared<float>(shared + 4 * i);
  cta_sync();
  if (threadIdx.x) return;
  if constexpr (R == 2) tma_store(&p.to, shared, 0, 1);
  if constexpr (R == 3) tma_store(&p.to, shared, 0, 1, 1);
  if constexpr (R == 5) tma_store(&p.to, shared, 0, 1, 1, 1, 1);
  tma_store_commit();
  tma_store_wait_read<0>();
}

template <int R> void check_rank() {
  uint64_t sizes[R], strides[R];
  uint32_t box[R];
  int64_t elements = 4;
  for (int d = 0; d < R; ++d) {  // 4 × 3 × … × 3, dense
    sizes[d] = d ? 3 : 4;
    box[d] = d ? 2 : 4;
    if (d) strides[d - 1] = 4 * elements;
    elements *= d ? 3 : 1;
  }
  std::vector<float> from(elements), to(elements, -1), shared(4 << (R - 1));
  for (int64_t i = 0; i < elements; ++i) from[i] = i;
  const auto map = [&](std::vector<float>& x) {
    return make_tensor_map(ElementType::Fp32, x.data(), R, sizes, strides, box, Swizzle::None);
  };
  expect_clean(rank_kernel<R>, {dim3(1), 32, 1024}, RankCase{map(from), map(to), shared.data()}, [&] {
    for (size_t i = 0; i < shared.size(); ++i) {
      int64_t at = i % 4;
      for (int64_t d = 1, size = 4, rest = i / 4; d < R; ++d, size *= 3, rest /= 2) at += (1 + rest % 2) * size;
      EXPECT_EQUAL(shared[i], from[at]);
      EXPECT_EQUAL(to[at], from[at]);
      to[at] = -1;
    }
    for (float x : to) EXPECT_EQUAL(x, -1.f);
  });
}

}  // namespace

TEST(boxes_of_rank_2) { check_rank<2>(); }
TEST(boxes_of_rank_3) { check_rank<3>(); }
TEST(boxes_of_rank_5) { check_rank<5>(); }

TEST(rounding) {
  // every fp16 survives; halves round to even; what lies between 65504 and 65520 is 65504
  for (uint32_t h = 0; h < 1 << 16; ++h) {
    const fp16 x{static_cast<uint16_t>(h)};
    if (to_float(x) == to_float(x)) EXPECT_EQUAL(int(from_float<fp16>(to_float(x)).bits), int(h));
  }
  const struct { float x; uint16_t bits; } fp16s[] = {{2049.f, 0x6800}, {2051.f, 0x6802}, {65519.f, 0x7bff},
                                                    {65520.f, 0x7c00}, {0x1.8p-24f, 0x0002}, {0x1p-25f, 0x0000},
                                                    {0x1.ffep-15f, 0x0400}, {-1.5f, 0xbe00}};
  for (const auto& c : fp16s) EXPECT_EQUAL(int(from_float<fp16>(c.x).bits), int(c.bits));
  const struct { float x; uint16_t bits; } bf16s[] = {{1.f, 0x3f80}, {0x1.01p0f, 0x3f80}, {0x1.03p0f, 0x3f82},
                                                    {0x1.02p0f, 0x3f81}, {-INFINITY, 0xff80}, {3.4e38f, 0x7f80}};
  for (const auto& c : bf16s) EXPECT_EQUAL(int(from_float<bf16>(c.x).bits), int(c.bits));
  EXPECT_EQUAL(pack<bf16>(1.f, 2.f), 0x40003f80u);
}

int main(int argc, char** argv) { return harness::main(argc, argv); }
