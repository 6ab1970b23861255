// Generic loads and stores of shared memory; `rank` is the CTA of the cluster whose memory it is.
#pragma once
#include <emulator/where.h>

#include <cstdint>

namespace emulator {

constexpr uint32_t SHARED_BASE = 1024;          // the driver keeps the first KiB
constexpr uint32_t SHARED_LIMIT = 227 << 10;    // bytes a CTA may ask for
constexpr uint8_t POISON_BYTE = 0xff;           // NaN in every floating-point format

struct Cta;
void load(uint32_t address, void* to, uint32_t bytes, const char* doing, const Where& where);
void store(uint32_t address, const void* from, uint32_t bytes, const char* doing, const Where& where);
void load_remote(uint32_t address, uint32_t rank, void* to, uint32_t bytes, const char* doing, const Where& where);
void store_remote(uint32_t address, uint32_t rank, const void* from, uint32_t bytes, const char* doing,
                  const Where& where);
void proxy_fence();

// Whether all of it is in the CTA's dynamic shared memory and aligned; if not, says so and gives up.
void check_range(const Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment, const char* doing,
                 const Where& where);

}  // namespace emulator
