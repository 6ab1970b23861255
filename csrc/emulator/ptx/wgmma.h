// The emulator's twin of cuda/ptx/wgmma.h.
#pragma once
#include <emulator/wgmma.h>
#include <ptx/layout.h>

namespace ptx {

using emulator::Where;

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit(Where where = Where::here()) { emulator::wgmma_commit(where); }

// A parameter pack leaves no room for a default argument behind it: one overload per number of arrays.
template <int N> void wgmma_wait(Where where = Where::here()) { emulator::wgmma_wait(N, {}, where); }
template <int N, class A> void wgmma_wait(A& a, Where where = Where::here()) {
  emulator::wgmma_wait(N, {{&a, sizeof(A)}}, where);
}
template <int N, class A, class B> void wgmma_wait(A& a, B& b, Where where = Where::here()) {
  emulator::wgmma_wait(N, {{&a, sizeof(A)}, {&b, sizeof(B)}}, where);
}
template <int N, class A, class B, class C> void wgmma_wait(A& a, B& b, C& c, Where where = Where::here()) {
  emulator::wgmma_wait(N, {{&a, sizeof(A)}, {&b, sizeof(B)}, {&c, sizeof(C)}}, where);
}
template <int N, class A, class B, class C, class D>
void wgmma_wait(A& a, B& b, C& c, D& d, Where where = Where::here()) {
  emulator::wgmma_wait(N, {{&a, sizeof(A)}, {&b, sizeof(B)}, {&c, sizeof(C)}, {&d, sizeof(D)}}, where);
}

namespace detail {
template <class E, int R>
constexpr emulator::WgmmaShape wgmma_shape(bool a_in_registers, int trans_a, int trans_b, int accumulate) {
  static_assert(R % 4 == 0 && R >= 4 && R <= 128, "N = 2 R is a multiple of 8 up to 256");
  static_assert(sizeof(E) == 2, "bf16 or fp16");
  return {2 * R, element_type<E>::value, a_in_registers, trans_a != 0, trans_b != 0, accumulate != 0};
}
}  // namespace detail

template <class E, int TRANS_A, int TRANS_B, int R>
void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, int accumulate, Where where = Where::here()) {
  emulator::wgmma_issue(detail::wgmma_shape<E, R>(false, TRANS_A, TRANS_B, accumulate), d, nullptr, a, b, where);
}

template <class E, int TRANS_B, int R>
void wgmma_rs(float (&d)[R], const uint32_t* a, uint64_t b, int accumulate, Where where = Where::here()) {
  emulator::wgmma_issue(detail::wgmma_shape<E, R>(true, 0, TRANS_B, accumulate), d, a, 0, b, where);
}

}  // namespace ptx
