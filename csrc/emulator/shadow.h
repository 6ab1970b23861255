// The happens-before check: for every word of shared memory, who last wrote it and who has read it since.
#pragma once
#include <emulator/clock.h>
#include <emulator/where.h>

#include <cstdint>
#include <vector>

namespace emulator {

struct Cta;

// Whoever touches memory: what it knows (and `self`, the thread whose own past it knows as well), and the epoch under
// which the access is remembered. For a thread both are the same; a TMA load knows what its thread knew, and is over
// when its mbarrier's phase is.
struct Actor {
  static constexpr Agent nobody = ~0u;
  Clock known;
  Agent self = nobody;
  Agent agent = 0;
  uint32_t time = 0;
  const char* doing = "";
  Where where;
  bool async_proxy = false;
};

struct Access {
  uint32_t time = 0;  // 0: none
  uint16_t agent = 0;
  uint16_t site : 12;
  uint16_t bytes : 4;  // of the word, a bit each

  Access() : site(0), bytes(0) {}
  Access(const Actor& actor, uint32_t site, uint8_t bytes)
      : time(actor.time), agent(static_cast<uint16_t>(actor.agent)), site(site), bytes(bytes) {}
};

constexpr uint32_t MAX_AGENTS = 1 << 16, MAX_SITES = 1 << 12;

struct Word {
  Access write[4];      // of each byte
  bool uniform = true;  // write[0] stands for all four
  uint8_t written = 0;  // bytes, a bit each
  bool in_flight = false;  // destination of a TMA load
  bool mbarrier = false;
  uint32_t more_reads = 0;  // 1 + index into Shadow::more_reads, when two are not enough
  Access read[2];           // since the bytes they read were written
};

class Shadow {
 public:
  void reset(Cta* cta, uint32_t base, uint32_t bytes);
  void read(uint32_t address, uint32_t bytes, const Actor& actor);
  void write(uint32_t address, uint32_t bytes, const Actor& actor);
  void set_in_flight(uint32_t address, uint32_t bytes, bool in_flight);
  void set_mbarrier(uint32_t address);

 private:
  void read_word(uint32_t address, uint8_t bytes, const Actor& actor, uint32_t site);
  void write_word(uint32_t address, uint8_t bytes, const Actor& actor, uint32_t site);
  bool check_against_write(const Word& word, uint32_t address, uint8_t bytes, const Actor& actor, bool reading);
  bool check_proxy_fence(const Access& before, uint32_t address, const Actor& actor, bool reading);
  void remember_read(Word& word, const Access& access, const Actor& actor);
  void conflict(uint32_t address, const Access& before, bool before_wrote, const Actor& actor, bool reading);
  bool ordered(const Access& before, const Actor& actor) const;
  Word& word(uint32_t address) { return words_[(address - base_) / 4]; }

  Cta* cta_ = nullptr;
  uint32_t base_ = 0;
  std::vector<Word> words_;
  std::vector<std::vector<Access>> more_reads_;
};

}  // namespace emulator
