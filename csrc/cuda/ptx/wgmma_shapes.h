// The operand lists of wgmma.mma_async.m64nNk16, R = N / 2 accumulators a thread, and one struct per N, for wgmma.h.
// Operands: the accumulators %0 … %(R-1), then a (a descriptor, or four registers), b, accumulate, trans.
#pragma once
#include <ptx/types.h>

namespace ptx {
namespace detail {

// "%0, …, %(R-1)"
#define FASTATTN_D4 "%0, %1, %2, %3"
#define FASTATTN_D8 FASTATTN_D4 ", %4, %5, %6, %7"
#define FASTATTN_D12 FASTATTN_D8 ", %8, %9, %10, %11"
#define FASTATTN_D16 FASTATTN_D12 ", %12, %13, %14, %15"
#define FASTATTN_D20 FASTATTN_D16 ", %16, %17, %18, %19"
#define FASTATTN_D24 FASTATTN_D20 ", %20, %21, %22, %23"
#define FASTATTN_D28 FASTATTN_D24 ", %24, %25, %26, %27"
#define FASTATTN_D32 FASTATTN_D28 ", %28, %29, %30, %31"
#define FASTATTN_D36 FASTATTN_D32 ", %32, %33, %34, %35"
#define FASTATTN_D40 FASTATTN_D36 ", %36, %37, %38, %39"
#define FASTATTN_D44 FASTATTN_D40 ", %40, %41, %42, %43"
#define FASTATTN_D48 FASTATTN_D44 ", %44, %45, %46, %47"
#define FASTATTN_D52 FASTATTN_D48 ", %48, %49, %50, %51"
#define FASTATTN_D56 FASTATTN_D52 ", %52, %53, %54, %55"
#define FASTATTN_D60 FASTATTN_D56 ", %56, %57, %58, %59"
#define FASTATTN_D64 FASTATTN_D60 ", %60, %61, %62, %63"
#define FASTATTN_D68 FASTATTN_D64 ", %64, %65, %66, %67"
#define FASTATTN_D72 FASTATTN_D68 ", %68, %69, %70, %71"
#define FASTATTN_D76 FASTATTN_D72 ", %72, %73, %74, %75"
#define FASTATTN_D80 FASTATTN_D76 ", %76, %77, %78, %79"
#define FASTATTN_D84 FASTATTN_D80 ", %80, %81, %82, %83"
#define FASTATTN_D88 FASTATTN_D84 ", %84, %85, %86, %87"
#define FASTATTN_D92 FASTATTN_D88 ", %88, %89, %90, %91"
#define FASTATTN_D96 FASTATTN_D92 ", %92, %93, %94, %95"
#define FASTATTN_D100 FASTATTN_D96 ", %96, %97, %98, %99"
#define FASTATTN_D104 FASTATTN_D100 ", %100, %101, %102, %103"
#define FASTATTN_D108 FASTATTN_D104 ", %104, %105, %106, %107"
#define FASTATTN_D112 FASTATTN_D108 ", %108, %109, %110, %111"
#define FASTATTN_D116 FASTATTN_D112 ", %112, %113, %114, %115"
#define FASTATTN_D120 FASTATTN_D116 ", %116, %117, %118, %119"
#define FASTATTN_D124 FASTATTN_D120 ", %120, %121, %122, %123"
#define FASTATTN_D128 FASTATTN_D124 ", %124, %125, %126, %127"

// "+f"(d[0]), …, "+f"(d[R-1])
#define FASTATTN_F(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTATTN_F4 FASTATTN_F(0)
#define FASTATTN_F8 FASTATTN_F4, FASTATTN_F(4)
#define FASTATTN_F12 FASTATTN_F8, FASTATTN_F(8)
#define FASTATTN_F16 FASTATTN_F12, FASTATTN_F(12)
#define FASTATTN_F20 FASTATTN_F16, FASTATTN_F(16)
#define FASTATTN_F24 FASTATTN_F20, FASTATTN_F(20)
#define FASTATTN_F28 FASTATTN_F24, FASTATTN_F(24)
#define FASTATTN_F32 FASTATTN_F28, FASTATTN_F(28)
#define FASTATTN_F36 FASTATTN_F32, FASTATTN_F(32)
#define FASTATTN_F40 FASTATTN_F36, FASTATTN_F(36)
#define FASTATTN_F44 FASTATTN_F40, FASTATTN_F(40)
#define FASTATTN_F48 FASTATTN_F44, FASTATTN_F(44)
#define FASTATTN_F52 FASTATTN_F48, FASTATTN_F(48)
#define FASTATTN_F56 FASTATTN_F52, FASTATTN_F(52)
#define FASTATTN_F60 FASTATTN_F56, FASTATTN_F(56)
#define FASTATTN_F64 FASTATTN_F60, FASTATTN_F(60)
#define FASTATTN_F68 FASTATTN_F64, FASTATTN_F(64)
#define FASTATTN_F72 FASTATTN_F68, FASTATTN_F(68)
#define FASTATTN_F76 FASTATTN_F72, FASTATTN_F(72)
#define FASTATTN_F80 FASTATTN_F76, FASTATTN_F(76)
#define FASTATTN_F84 FASTATTN_F80, FASTATTN_F(80)
#define FASTATTN_F88 FASTATTN_F84, FASTATTN_F(84)
#define FASTATTN_F92 FASTATTN_F88, FASTATTN_F(88)
#define FASTATTN_F96 FASTATTN_F92, FASTATTN_F(92)
#define FASTATTN_F100 FASTATTN_F96, FASTATTN_F(96)
#define FASTATTN_F104 FASTATTN_F100, FASTATTN_F(100)
#define FASTATTN_F108 FASTATTN_F104, FASTATTN_F(104)
#define FASTATTN_F112 FASTATTN_F108, FASTATTN_F(108)
#define FASTATTN_F116 FASTATTN_F112, FASTATTN_F(112)
#define FASTATTN_F120 FASTATTN_F116, FASTATTN_F(116)
#define FASTATTN_F124 FASTATTN_F120, FASTATTN_F(120)
#define FASTATTN_F128 FASTATTN_F124, FASTATTN_F(124)

#define FASTATTN_WGMMA_SS(N, R, TYPE, A, B, ACCUMULATE, TRANS_A, TRANS_B)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                              \
               " {" FASTATTN_D##R "}, %" #A ", %" #B ", p, 1, 1, %" #TRANS_A ", %" #TRANS_B ";\n}"           \
               : FASTATTN_F##R : "l"(a), "l"(b), "r"(accumulate), "n"(trans_a), "n"(trans_b))

#define FASTATTN_WGMMA_RS(N, R, TYPE, A0, A1, A2, A3, B, ACCUMULATE, TRANS_B)                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                              \
               " {" FASTATTN_D##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B                       \
               ", p, 1, 1, %" #TRANS_B ";\n}"                                                               \
               : FASTATTN_F##R : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(trans_b))

template <class E> constexpr bool is_bf16 = element_type<E>::value == ElementType::Bf16;

template <int N> struct WgmmaShape;

// I0 … I6: R, R + 1, …, R + 6.
#define FASTATTN_WGMMA_SHAPE(N, R, I1, I2, I3, I4, I5, I6)                                                  \
  template <> struct WgmmaShape<N> {                                                                        \
    template <class E, int trans_a, int trans_b>                                                            \
    __device__ static __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {      \
      if constexpr (is_bf16<E>) FASTATTN_WGMMA_SS(N, R, "bf16", R, I1, I2, I3, I4);                         \
      else FASTATTN_WGMMA_SS(N, R, "f16", R, I1, I2, I3, I4);                                               \
    }                                                                                                       \
    template <class E, int trans_b>                                                                         \
    __device__ static __forceinline__ void rs(float (&d)[R], const uint32_t* a, uint64_t b, int accumulate) { \
      if constexpr (is_bf16<E>) FASTATTN_WGMMA_RS(N, R, "bf16", R, I1, I2, I3, I4, I5, I6);                 \
      else FASTATTN_WGMMA_RS(N, R, "f16", R, I1, I2, I3, I4, I5, I6);                                       \
    }                                                                                                       \
  };

FASTATTN_WGMMA_SHAPE(8, 4, 5, 6, 7, 8, 9, 10)
FASTATTN_WGMMA_SHAPE(16, 8, 9, 10, 11, 12, 13, 14)
FASTATTN_WGMMA_SHAPE(24, 12, 13, 14, 15, 16, 17, 18)
FASTATTN_WGMMA_SHAPE(32, 16, 17, 18, 19, 20, 21, 22)
FASTATTN_WGMMA_SHAPE(40, 20, 21, 22, 23, 24, 25, 26)
FASTATTN_WGMMA_SHAPE(48, 24, 25, 26, 27, 28, 29, 30)
FASTATTN_WGMMA_SHAPE(56, 28, 29, 30, 31, 32, 33, 34)
FASTATTN_WGMMA_SHAPE(64, 32, 33, 34, 35, 36, 37, 38)
FASTATTN_WGMMA_SHAPE(72, 36, 37, 38, 39, 40, 41, 42)
FASTATTN_WGMMA_SHAPE(80, 40, 41, 42, 43, 44, 45, 46)
FASTATTN_WGMMA_SHAPE(88, 44, 45, 46, 47, 48, 49, 50)
FASTATTN_WGMMA_SHAPE(96, 48, 49, 50, 51, 52, 53, 54)
FASTATTN_WGMMA_SHAPE(104, 52, 53, 54, 55, 56, 57, 58)
FASTATTN_WGMMA_SHAPE(112, 56, 57, 58, 59, 60, 61, 62)
FASTATTN_WGMMA_SHAPE(120, 60, 61, 62, 63, 64, 65, 66)
FASTATTN_WGMMA_SHAPE(128, 64, 65, 66, 67, 68, 69, 70)
FASTATTN_WGMMA_SHAPE(136, 68, 69, 70, 71, 72, 73, 74)
FASTATTN_WGMMA_SHAPE(144, 72, 73, 74, 75, 76, 77, 78)
FASTATTN_WGMMA_SHAPE(152, 76, 77, 78, 79, 80, 81, 82)
FASTATTN_WGMMA_SHAPE(160, 80, 81, 82, 83, 84, 85, 86)
FASTATTN_WGMMA_SHAPE(168, 84, 85, 86, 87, 88, 89, 90)
FASTATTN_WGMMA_SHAPE(176, 88, 89, 90, 91, 92, 93, 94)
FASTATTN_WGMMA_SHAPE(184, 92, 93, 94, 95, 96, 97, 98)
FASTATTN_WGMMA_SHAPE(192, 96, 97, 98, 99, 100, 101, 102)
FASTATTN_WGMMA_SHAPE(200, 100, 101, 102, 103, 104, 105, 106)
FASTATTN_WGMMA_SHAPE(208, 104, 105, 106, 107, 108, 109, 110)
FASTATTN_WGMMA_SHAPE(216, 108, 109, 110, 111, 112, 113, 114)
FASTATTN_WGMMA_SHAPE(224, 112, 113, 114, 115, 116, 117, 118)
FASTATTN_WGMMA_SHAPE(232, 116, 117, 118, 119, 120, 121, 122)
FASTATTN_WGMMA_SHAPE(240, 120, 121, 122, 123, 124, 125, 126)
FASTATTN_WGMMA_SHAPE(248, 124, 125, 126, 127, 128, 129, 130)
FASTATTN_WGMMA_SHAPE(256, 128, 129, 130, 131, 132, 133, 134)

}  // namespace detail
}  // namespace ptx
