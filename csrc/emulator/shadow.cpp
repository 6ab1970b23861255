#include <emulator/machine.h>
#include <emulator/shadow.h>

#include <algorithm>

namespace emulator {

namespace {

// The bytes of the word at `word` (a multiple of 4) that [address, address + bytes) covers, a bit each.
uint8_t covered(uint32_t word, uint32_t address, uint32_t bytes) {
  const uint32_t begin = std::max(address, word) - word, end = std::min(address + bytes, word + 4) - word;
  return static_cast<uint8_t>((1u << end) - (1u << begin));
}

// What is missing between two accesses that nothing orders.
const char* missing(AgentInfo::Kind before, bool before_wrote, const AgentInfo::Kind now, bool reading, bool async) {
  using Kind = AgentInfo::Kind;
  if (before == Kind::Mbarrier) return "no mbarrier_wait for that load comes before";
  if (before == Kind::Wgmma) return "no wgmma_wait for it comes before (wait, release the stage, wait for the release)";
  if (before == Kind::BulkStore) return "no tma_store_wait_read for it, by the thread that issued it, comes before";
  if (now == Kind::Mbarrier) return "no barrier between that access and this load (an empty-barrier wait, or a sync)";
  if (async && reading && before_wrote) return "no barrier between that store and this thread";
  return "no barrier (cta_sync, barrier_sync, warp_sync, cluster_sync, mbarrier) between the two";
}

}  // namespace

void Shadow::reset(Cta* cta, uint32_t base, uint32_t bytes) {
  cta_ = cta;
  base_ = base;
  words_.assign((bytes + 3) / 4, Word());
  more_reads_.clear();
}

bool Shadow::ordered(const Access& before, const Actor& actor) const {
  return before.agent == actor.self || actor.known[before.agent] >= before.time;
}

void Shadow::conflict(uint32_t address, const Access& before, bool before_wrote, const Actor& actor, bool reading) {
  const Site& site = machine->sites[before.site];
  Cluster& cluster = *cta_->cluster;
  const AgentInfo::Kind now = cluster.agents[actor.agent].kind;
  const std::string message =
      std::string(actor.doing) + (reading ? " reads" : " writes") + " shared " + hex(address) + " of " +
      describe(*cta_) + (before_wrote ? ", written by " : ", read by ") + site.doing + " at " + to_string(site.where) +
      " (" + cluster.describe(before.agent) + "): " +
      missing(cluster.agents[before.agent].kind, before_wrote, now, reading, actor.async_proxy);
  finding(reading ? "race: read after write" : before_wrote ? "race: write after write" : "race: write after read",
          actor.where, message);
}

bool Shadow::check_against_write(const Word& word, uint32_t address, uint8_t bytes, const Actor& actor, bool reading) {
  if (word.mbarrier) {
    finding("mbarrier overwritten", actor.where, std::string(actor.doing) + " touches the mbarrier at " + hex(address));
    return false;
  }
  if (word.in_flight) {
    const Site& site = machine->sites[word.write[0].site];
    finding("race: TMA load in flight", actor.where,
            std::string(actor.doing) + (reading ? " reads" : " writes") + " shared " + hex(address) + " of " +
                describe(*cta_) + ", which the load at " + to_string(site.where) +
                " has not filled: no mbarrier_wait for that load comes before");
    return false;
  }
  for (int byte = 0; byte < (word.uniform ? 1 : 4); ++byte) {
    const Access& before = word.write[byte];
    if (!before.time || (!word.uniform && !(bytes >> byte & 1))) continue;
    if (!ordered(before, actor)) {
      conflict(address, before, true, actor, reading);
      return false;
    }
    if (actor.async_proxy && !check_proxy_fence(before, address, actor, reading)) return false;
  }
  return true;
}

// The latest proxy fence of the writer that the actor knows of has to be younger than the store.
bool Shadow::check_proxy_fence(const Access& before, uint32_t address, const Actor& actor, bool reading) {
  const Thread* writer = cta_->cluster->thread_of(before.agent);
  if (!writer) return true;
  const uint32_t known = before.agent == actor.self ? ~0u : actor.known[before.agent];
  const auto& fences = writer->proxy_fences;
  const auto after = std::upper_bound(fences.begin(), fences.end(), known);
  if (after != fences.begin() && *(after - 1) >= before.time) return true;
  const Site& site = machine->sites[before.site];
  finding("missing proxy fence", actor.where,
          std::string(actor.doing) + (reading ? " reads" : " overwrites") + " shared " + hex(address) + " of " +
              describe(*cta_) + ", stored by " + site.doing + " at " + to_string(site.where) + " (" +
              describe(*writer) + ") with no fence_proxy_async of that thread between");
  return false;
}

void Shadow::remember_read(Word& word, const Access& access, const Actor& actor) {
  // A read that comes before this one and touches no other bytes need not be remembered beside it.
  const auto replaces = [&](const Access& slot) {
    return !slot.time || (!(slot.bytes & ~access.bytes) && (slot.agent == access.agent || ordered(slot, actor)));
  };
  for (Access& slot : word.read)
    if (replaces(slot)) {
      slot = access;
      return;
    }
  if (!word.more_reads) {
    more_reads_.emplace_back();
    word.more_reads = more_reads_.size();
  }
  auto& more = more_reads_[word.more_reads - 1];
  for (Access& slot : more)
    if (slot.agent == access.agent && replaces(slot)) {
      slot = access;
      return;
    }
  more.push_back(access);
}

void Shadow::read_word(uint32_t address, uint8_t bytes, const Actor& actor, uint32_t site) {
  Word& w = word(address);
  if (!check_against_write(w, address, bytes, actor, true)) return;
  if (bytes & ~w.written) {
    finding("uninitialised shared memory", actor.where,
            std::string(actor.doing) + " reads shared " + hex(address) + " of " + describe(*cta_) +
                ", which nothing has written");
    w.written |= bytes;
  }
  remember_read(w, Access(actor, site, bytes), actor);
}

void Shadow::write_word(uint32_t address, uint8_t bytes, const Actor& actor, uint32_t site) {
  Word& w = word(address);
  if (check_against_write(w, address, bytes, actor, false)) {
    bool found = false;
    auto check = [&](const Access& before) {
      if (found || !before.time || !(before.bytes & bytes) || ordered(before, actor)) return;
      conflict(address, before, false, actor, false);
      found = true;
    };
    for (const Access& before : w.read) check(before);
    if (w.more_reads)
      for (const Access& before : more_reads_[w.more_reads - 1]) check(before);
  }
  const Access access(actor, site, bytes);
  if (bytes == 0xf) {
    w.write[0] = access;
    w.uniform = true;
  } else {
    if (w.uniform) std::fill(w.write + 1, w.write + 4, w.write[0]);
    w.uniform = false;
    for (int byte = 0; byte < 4; ++byte)
      if (bytes >> byte & 1) w.write[byte] = access;
  }
  for (Access& slot : w.read) {
    slot.bytes &= ~bytes;
    if (!slot.bytes) slot.time = 0;
  }
  if (w.more_reads) {
    auto& more = more_reads_[w.more_reads - 1];
    for (Access& slot : more) slot.bytes &= ~bytes;
    more.erase(std::remove_if(more.begin(), more.end(), [](const Access& a) { return !a.bytes; }), more.end());
  }
  w.written |= bytes;
}

void Shadow::read(uint32_t address, uint32_t bytes, const Actor& actor) {
  const uint32_t site = machine->site(actor.doing, actor.where);
  for (uint32_t w = address & ~3u; w < address + bytes; w += 4) read_word(w, covered(w, address, bytes), actor, site);
}

void Shadow::write(uint32_t address, uint32_t bytes, const Actor& actor) {
  const uint32_t site = machine->site(actor.doing, actor.where);
  for (uint32_t w = address & ~3u; w < address + bytes; w += 4) write_word(w, covered(w, address, bytes), actor, site);
}

void Shadow::set_in_flight(uint32_t address, uint32_t bytes, bool in_flight) {
  for (uint32_t w = address & ~3u; w < address + bytes; w += 4) word(w).in_flight = in_flight;
}

void Shadow::set_mbarrier(uint32_t address) {
  word(address).mbarrier = word(address + 4).mbarrier = true;
}

}  // namespace emulator
