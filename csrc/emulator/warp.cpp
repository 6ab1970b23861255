#include <emulator/machine.h>
#include <emulator/shared_memory.h>
#include <emulator/warp.h>

#include <cstring>

namespace emulator {

namespace {

void finish_if_complete(Warp& warp) {
  if (warp.arrived < warp.live || !warp.arrived) return;
  warp.arrived = 0;
  warp.released[warp.generation++ % 2] = warp.arriving.take();
  warp.waiters.wake();
}

// Returns the generation of the collective, once every lane is there.
uint64_t meet(const uint32_t* mine, int words, bool orders_memory, const char* doing, const Where& where) {
  Thread& thread = current();
  Warp& warp = thread.cta->warp_of(thread);
  if (warp.arrived && std::strcmp(warp.doing, doing)) {
    finding("divergent warp", where,
            "lanes of a warp are at " + std::string(doing) + " here and at " + warp.doing + " at " +
                to_string(warp.where) + ": a collective is executed by all of them together");
    give_up();
  }
  const uint64_t generation = warp.generation;
  if (!warp.arrived) warp.exchange[generation % 2] = Exchange();
  warp.doing = doing;
  warp.where = where;
  if (words) std::memcpy(warp.exchange[generation % 2].word[thread.lane()], mine, 4 * words);
  ++warp.arrived;
  if (orders_memory) thread.release_to(warp.arriving);
  finish_if_complete(warp);
  wait_until(warp.waiters, {doing, 0, where}, [&] { return warp.generation != generation; });
  return generation;
}

// Element (i, j) of 8×8 matrix m, whose rows' addresses lanes 8m … 8m + 7 gave.
uint32_t element_address(const Exchange& all, int m, int i, int j) { return all.word[8 * m + i][0] + 2 * j; }

}  // namespace

const Exchange& warp_exchange(const uint32_t* mine, int words, const char* doing, const Where& where) {
  const uint64_t generation = meet(mine, words, false, doing, where);
  return current().cta->warp_of(current()).exchange[generation % 2];
}

void warp_sync(const Where& where) {
  const uint64_t generation = meet(nullptr, 0, true, "warp_sync", where);
  Thread& thread = current();
  thread.learn(thread.cta->warp_of(thread).released[generation % 2]);
}

void warp_thread_exit(Cta& cta, uint32_t warp) {
  --cta.warps[warp].live;
  finish_if_complete(cta.warps[warp]);
}

void ldmatrix(uint32_t (&r)[4], uint32_t address, bool transposed, const Where& where) {
  const char* doing = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
  check_range(*current().cta, address, 16, 16, doing, where);
  const Exchange& all = warp_exchange(&address, 1, doing, where);
  const int l = current().lane();
  for (int m = 0; m < 4; ++m) {
    if (!transposed) {
      load(element_address(all, m, l / 4, 2 * (l % 4)), &r[m], 4, doing, where);
      continue;
    }
    uint16_t half[2];
    for (int e = 0; e < 2; ++e) load(element_address(all, m, 2 * (l % 4) + e, l / 4), &half[e], 2, doing, where);
    r[m] = half[0] | uint32_t(half[1]) << 16;
  }
}

void stmatrix(uint32_t address, const uint32_t (&r)[4], bool transposed, const Where& where) {
  const char* doing = transposed ? "stmatrix_x4_trans" : "stmatrix_x4";
  check_range(*current().cta, address, 16, 16, doing, where);
  maybe_yield();
  const Exchange& all = warp_exchange(&address, 1, doing, where);
  const int l = current().lane();
  for (int m = 0; m < 4; ++m) {
    if (!transposed) {
      store(element_address(all, m, l / 4, 2 * (l % 4)), &r[m], 4, doing, where);
      continue;
    }
    for (int e = 0; e < 2; ++e) {
      const uint16_t half = r[m] >> (16 * e);
      store(element_address(all, m, 2 * (l % 4) + e, l / 4), &half, 2, doing, where);
    }
  }
}

void set_max_registers(int registers, const Where& where) {
  current().max_registers = registers;
  current().max_registers_where = where;
}

}  // namespace emulator
