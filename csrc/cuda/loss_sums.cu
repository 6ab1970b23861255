// Sums of a loss: Σ of the losses of P rows, and Σ of the weights of their classes, which a mean is divided by.
//
//   out = Σ_p values_p / divisor            out = Σ_p w_t(p) [t(p) counts]
//
// Without atomics: CTA i adds up a slice of the values into partial[i], and one more CTA these, in one order.
#include <ptx/global.h>
#include <rows/class_of_row.h>
#include <rows/cross_entropy.h>
#include <rows/launch_rows.h>
#include <rows/team.h>

namespace rows {

constexpr int64_t SLICE = 16 * MAX_THREADS;  // values of a CTA, at least
constexpr int MOST_SLICES = 256;

__device__ __forceinline__ float load_value(const SumValues& p, int64_t i) {
  return ptx::ld_global_streaming(p.values + i);
}
__device__ __forceinline__ float divided(const SumValues& p, float sum) { return p.divisor ? sum / *p.divisor : sum; }

__device__ __forceinline__ float load_value(const CountClasses& p, int64_t i) {
  const int64_t target = load_target(p.target, p.target_64, i);
  if (p.weight.dtype == Dtype::Float16) return ClassOfRow::of<ptx::fp16>(p, target, true, p.N).weight;
  return ClassOfRow::of<ptx::bf16>(p, target, true, p.N).weight;
}
__device__ __forceinline__ float divided(const CountClasses&, float sum) { return sum; }

__device__ __forceinline__ void store_sum(const Vector& out, float sum) {
  const unsigned i = blockIdx.x;
  if (out.dtype == Dtype::Float32) static_cast<float*>(out.data)[i] = sum;
  else if (out.dtype == Dtype::Bfloat16) static_cast<ptx::bf16*>(out.data)[i] = ptx::from_float<ptx::bf16>(sum);
  else static_cast<ptx::fp16*>(out.data)[i] = ptx::from_float<ptx::fp16>(sum);
}

template <class Params> __global__ void __launch_bounds__(MAX_THREADS) sum_kernel(const __grid_constant__ Params p) {
  Walk walk;
  walk.log_threads = 9;
  static_assert(MAX_THREADS == 1 << 9, "a CTA is one row");
  Team<NoBugs> team(walk);
  const int64_t slice = (p.P + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * slice;
  const int64_t end = begin + slice < p.P ? begin + slice : p.P;
  Sums<1> sum{{0.f}};
  for (int64_t i = begin + threadIdx.x; i < end; i += MAX_THREADS) sum.field[0] += load_value(p, i);
  sum = team.reduce(sum);
  if (threadIdx.x == 0) store_sum(p.out, divided(p, sum.field[0]));
}

int sum_partials(int64_t P) {
  return static_cast<int>(std::clamp<int64_t>((P + SLICE - 1) / SLICE, 1, MOST_SLICES));
}

template <class Params> static void launch_sum(const Params& p, int slices, cudaStream_t stream) {
  launch(sum_kernel<Params>, LaunchShape{dim3(slices), MAX_THREADS, REDUCTION_BYTES}, stream, p);
}

void sum_values(SumValues p, float* partial, cudaStream_t stream) {
  const int slices = sum_partials(p.P);
  if (slices > 1) {
    launch_sum(SumValues{{partial, Dtype::Float32}, p.values, nullptr, p.P}, slices, stream);
    p.values = partial;
    p.P = slices;
  }
  launch_sum(p, 1, stream);
}

void count_classes(CountClasses p, float* partial, cudaStream_t stream) {
  const int slices = sum_partials(p.P);
  const Vector out = p.out;
  if (slices > 1) p.out = {partial, Dtype::Float32};
  launch_sum(p, slices, stream);
  if (slices > 1) launch_sum(SumValues{out, partial, nullptr, slices}, 1, stream);
}

}  // namespace rows
