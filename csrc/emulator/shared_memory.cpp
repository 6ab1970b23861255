#include <emulator/machine.h>
#include <emulator/shared_memory.h>

#include <cstring>

namespace emulator {

uint8_t* Cta::at(uint32_t address) { return memory.data() + (address - SHARED_BASE); }

Actor Thread::actor(const char* doing, const Where& where) const {
  return {known, agent, agent, time, doing, where, false};
}

void check_range(const Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment, const char* doing,
                 const Where& where) {
  const uint64_t end = uint64_t(SHARED_BASE) + cta.memory.size();
  if (address < SHARED_BASE || uint64_t(address) + bytes > end) {
    finding("shared memory out of range", where,
            std::string(doing) + " of " + std::to_string(bytes) + " bytes at " + hex(address) + "; the CTA has " +
                hex(SHARED_BASE) + " to " + hex(end));
    give_up();
  }
  if (address % alignment) {
    finding("misaligned shared address", where,
            std::string(doing) + " at " + hex(address) + " has to be aligned to " + std::to_string(alignment) +
                " bytes");
    give_up();
  }
}

static void load_from(Cta& cta, uint32_t address, void* to, uint32_t bytes, const char* doing, const Where& where) {
  check_range(cta, address, bytes, bytes, doing, where);
  cta.shadow.read(address, bytes, current().actor(doing, where));
  std::memcpy(to, cta.at(address), bytes);
}

static void store_to(Cta& cta, uint32_t address, const void* from, uint32_t bytes, const char* doing,
                     const Where& where) {
  check_range(cta, address, bytes, bytes, doing, where);
  cta.shadow.write(address, bytes, current().actor(doing, where));
  std::memcpy(cta.at(address), from, bytes);
}

void load(uint32_t address, void* to, uint32_t bytes, const char* doing, const Where& where) {
  load_from(*current().cta, address, to, bytes, doing, where);
}

void store(uint32_t address, const void* from, uint32_t bytes, const char* doing, const Where& where) {
  store_to(*current().cta, address, from, bytes, doing, where);
}

void load_remote(uint32_t address, uint32_t rank, void* to, uint32_t bytes, const char* doing, const Where& where) {
  maybe_yield();
  load_from(remote_cta(rank, doing, where), address, to, bytes, doing, where);
}

void store_remote(uint32_t address, uint32_t rank, const void* from, uint32_t bytes, const char* doing,
                  const Where& where) {
  maybe_yield();
  store_to(remote_cta(rank, doing, where), address, from, bytes, doing, where);
}

void proxy_fence() {
  Thread& thread = current();
  thread.proxy_fences.push_back(thread.time++);
}

}  // namespace emulator
