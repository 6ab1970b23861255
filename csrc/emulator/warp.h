// Operations that a warp carries out together.
#pragma once
#include <emulator/clock.h>
#include <emulator/scheduler.h>

#include <cstdint>

namespace emulator {

struct Cta;

struct Exchange { uint32_t word[32][2] = {}; };  // what each lane brought; zeros of a lane that has exited

struct Warp {
  uint32_t live = 0;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  const char* doing = "";
  Where where;
  Exchange exchange[2];  // of this generation and the one before
  ClockGather arriving;
  Clock released[2];
  WaitList waiters;
};

// Brings `words` words and returns what every lane brought, once all lanes have.
const Exchange& warp_exchange(const uint32_t* mine, int words, const char* doing, const Where& where);
void warp_sync(const Where& where);
void warp_thread_exit(Cta& cta, uint32_t warp);

void ldmatrix(uint32_t (&r)[4], uint32_t address, bool transposed, const Where& where);
void stmatrix(uint32_t address, const uint32_t (&r)[4], bool transposed, const Where& where);

void set_max_registers(int registers, const Where& where);

}  // namespace emulator
