"""Numbers that several blocks use, as constexprs."""

import triton.language as tl

INF: tl.constexpr = tl.constexpr(float("inf"))
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
