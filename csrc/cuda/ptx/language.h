// The CUDA language itself; the emulator's header of this name defines the same words for g++.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
