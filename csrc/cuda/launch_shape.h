// How a kernel is launched, on a GPU and in the emulator.
#pragma once
#include <ptx/language.h>

struct LaunchShape {
  dim3 grid;
  int threads;
  uint32_t shared_bytes;
  int cluster = 1;  // CTAs along x; grid.x is a multiple
};
