#include <sm90/attention.h>
#include <sm90/attention_launch.h>

namespace {

// Calls `run` with the config for these widths and this many queries a sequence, as a type; returns whether there is one.
template <class Run>
bool with_config(int D, int D_v, int queries, const Run& run) {
  using sm90::Tuned;
  if (D == 64 && D_v == 64 && queries <= 2048) return run(Tuned<64, 64, true>{}), true;
  if (D == 64 && D_v == 64) return run(Tuned<64, 64>{}), true;
  if (D == 96 && D_v == 96) return run(Tuned<96, 96>{}), true;
  if (D == 128 && D_v == 128) return run(Tuned<128, 128>{}), true;
  if (D == 192 && D_v == 128) return run(Tuned<192, 128>{}), true;
  if (D == 192 && D_v == 192) return run(Tuned<192, 192>{}), true;
  if (D == 256 && D_v == 256) return run(Tuned<256, 256>{}), true;
  return false;
}

}  // namespace

void attention_forward(const AttentionForwardParams& x, void* stream) {
  const int queries = x.cu_seqlens_q == nullptr || x.B == 0 ? x.S_q : x.S_q / x.B;
  const bool known = with_config(x.D, x.D_v, queries, [&](auto config) {
    using Config = decltype(config);
    const auto launched = static_cast<cudaStream_t>(stream);
    if (x.dtype == AttentionDtype::Bf16) return sm90::launch_attention_forward<ptx::bf16, Config>(x, launched);
    sm90::launch_attention_forward<ptx::fp16, Config>(x, launched);
  });
  if (known) return;
  throw std::invalid_argument("`q` and `v` are " + std::to_string(x.D) + " and " + std::to_string(x.D_v) +
                              " wide; accepted are 64, 96, 128, 192 and 256, the same for both, and 192 with 128.");
}

std::string attention_forward_config(int D, int D_v, int S_q) {
  std::string text;
  with_config(D, D_v, S_q, [&](auto config) { text = config.value.describe(); });
  return text;
}
