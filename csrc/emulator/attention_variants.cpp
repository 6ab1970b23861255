#include <emulator/attention_variants.h>
#include <sm90/attention_launch.h>

#include <algorithm>
#include <map>

namespace emulator {
namespace {

using sm90::AttentionConfig;
using sm90::Bug;

Bug planted = Bug::None;

struct PlantedBug {
  static bool has(Bug bug) { return bug == planted; }
};

//                                               D   D_v M    N    stages p-p   lazy  poly  cluster
struct Small { static constexpr AttentionConfig value{64, 64, 128, 64, 2, true, 8, 2, 3, 1}; };
struct Pair { static constexpr AttentionConfig value{64, 64, 64, 64, 2, true, 8, 0, 3, 2}; };
struct Eager { static constexpr AttentionConfig value{64, 64, 128, 80, 2, false, 0, 0, 3, 1}; };
struct Deep { static constexpr AttentionConfig value{64, 64, 192, 48, 3, true, 4, 8, 4, 1}; };
struct Lone { static constexpr AttentionConfig value{128, 128, 64, 176, 2, false, 1, 8, 5, 1}; };

using Long = sm90::Tuned<64, 64>;  // what many queries get

template <class Config>
void run(const AttentionForwardParams& x, cudaStream_t stream) {
  if (x.D != Config::value.D || x.D_v != Config::value.D_v || x.dtype != AttentionDtype::Bf16)
    throw std::invalid_argument("the variant is of bf16 and of " + Config::value.describe());
  sm90::launch_attention_forward<ptx::bf16, Config, PlantedBug>(x, stream);
}

using Run = void (*)(const AttentionForwardParams&, cudaStream_t);
const std::map<std::string, Run> CONFIGS = {
    {"small", run<Small>}, {"pair", run<Pair>}, {"eager", run<Eager>}, {"deep", run<Deep>}, {"lone", run<Lone>}, {"long", run<Long>}};

#define BUG(NAME) {#NAME, Bug::NAME}
const std::map<std::string, Bug> BUGS = {
    BUG(None), BUG(NoInitSync), BUG(NoKeyFullWait), BUG(NoValueFullWait), BUG(NoKeyEmptyWait), BUG(NoValueEmptyWait),
    BUG(NoQueryEmptyWait), BUG(NoTileEmptyWait), BUG(EarlyKeyRelease), BUG(EarlyValueRelease), BUG(NoScoreWait),
    BUG(EarlyRescale), BUG(EarlyPack), BUG(NoWgmmaFence), BUG(ShortExpect), BUG(WrongParity), BUG(WrongKeyStride),
    BUG(WrongValueStride), BUG(NoProxyFence), BUG(NoEpilogueBarrier), BUG(NoStoreWait), BUG(MaskOffByOne),
    BUG(NoRescale), BUG(LeakHidden), BUG(StoreBeyondSequence), BUG(CounterLeft), BUG(ReleaseToSelf)};
#undef BUG

Run variant = run<Small>;

template <class Map>
typename Map::mapped_type entry(const Map& map, const char* what, const std::string& name) {
  const auto found = map.find(name);
  if (found != map.end()) return found->second;
  throw std::invalid_argument(std::string("there is no ") + what + " '" + name + "'");
}

template <class Map>
std::vector<std::string> names(const Map& map) {
  std::vector<std::string> all;
  for (const auto& [name, value] : map) all.push_back(name);
  return all;
}

}  // namespace

void set_attention_variant(const std::string& config, const std::string& bug) {
  variant = entry(CONFIGS, "config", config);
  planted = entry(BUGS, "bug", bug);
}

std::vector<std::string> attention_variants() { return names(CONFIGS); }
std::vector<std::string> attention_bugs() { return names(BUGS); }

void attention_forward_variant(const AttentionForwardParams& x, void* stream) {
  variant(x, static_cast<cudaStream_t>(stream));
}

}  // namespace emulator
