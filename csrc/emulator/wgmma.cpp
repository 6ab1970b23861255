#include <emulator/machine.h>
#include <emulator/shared_memory.h>
#include <emulator/wgmma.h>
#include <ptx/numeric.h>

#include <algorithm>
#include <cstring>

namespace emulator {

namespace {

constexpr int M = 64, K = 16, MAX_N = 256;

int fragment_row(int t, int i) { return 16 * (t / 32) + t % 32 / 4 + 8 * (i >> 1 & 1); }
int fragment_column(int t, int i) { return 8 * (i / 4) + 2 * (t % 4) + (i & 1); }

struct Descriptor {
  uint32_t start, lbo, sbo;
  ptx::Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), lbo((bits >> 16 & 0x3fff) << 4), sbo((bits >> 32 & 0x3fff) << 4),
        swizzle(static_cast<ptx::Swizzle>(bits >> 62)) {}

  // Address of the 16-byte chunk that holds (mn, k): 8 elements along k (K-major) or along mn (MN-major).
  uint32_t chunk(bool mn_major, int mn, int k) const {
    const uint32_t width = ptx::swizzle_width(swizzle), chunks = width / 16;
    uint32_t offset;
    if (swizzle == ptx::Swizzle::None)
      offset = mn_major ? mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo : mn % 8 * 16 + mn / 8 * sbo + k / 8 * lbo;
    else if (mn_major)
      offset = mn / 8 % chunks * 16 + mn / 8 / chunks * lbo + k % 8 * width + k / 8 * sbo;
    else
      offset = mn % 8 * width + mn / 8 * sbo + k / 8 * 16;
    return ptx::swizzle(start + offset, swizzle);
  }
};

template <class F> void for_each_chunk(const Descriptor& d, bool mn_major, int rows, F f) {  // f(address, mn, k)
  for (int mn = 0; mn < rows; mn += mn_major ? 8 : 1)
    for (int k = 0; k < K; k += mn_major ? 1 : 8) f(d.chunk(mn_major, mn, k), mn, k);
}

const float* float_of_fp16() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t h = 0; h < values.size(); ++h) values[h] = ptx::to_float(ptx::fp16{static_cast<uint16_t>(h)});
    return values;
  }();
  return table.data();
}

float to_float(uint16_t bits, ptx::ElementType type) {
  return type == ptx::ElementType::Bf16 ? ptx::to_float(ptx::bf16{bits}) : float_of_fp16()[bits];
}

// The operand at `d` as [rows][16] (row_stride 16, k_stride 1) or [16][rows].
void load_operand(Cta& cta, const Descriptor& d, bool mn_major, int rows, ptx::ElementType type, float* out,
                  int row_stride, int k_stride) {
  for_each_chunk(d, mn_major, rows, [&](uint32_t address, int mn, int k) {
    uint16_t bits[8];
    std::memcpy(bits, cta.at(address), 16);
    for (int i = 0; i < 8; ++i)
      out[(mn_major ? mn + i : mn) * row_stride + (mn_major ? k : k + i) * k_stride] = to_float(bits[i], type);
  });
}

#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default"), optimize("O3")))
#endif
void multiply(const float* a, const float* b, float* d, int n) {  // d[64][n] += a[64][16] · b[16][n]
  for (int m = 0; m < M; ++m) {
    float* row = d + m * n;
    for (int k = 0; k < K; ++k) {
      const float x = a[m * K + k];
      const float* y = b + k * n;
      for (int j = 0; j < n; ++j) row[j] += x * y[j];
    }
  }
}

// Whether the thread has left alone the registers that the tensor core is working on.
bool untouched(const Accumulator& acc, int t) {
  for (int i = 0; i < acc.n / 2; ++i) {
    const float* value = acc.shown ? &acc.values[fragment_row(t, i) * acc.n + fragment_column(t, i)] : nullptr;
    if (std::memcmp(acc.d[t] + i, value ? static_cast<const void*>(value) : &ACCUMULATOR_POISON, 4)) return false;
  }
  return true;
}

void show(const Accumulator& acc, int t) {
  for (int i = 0; i < acc.n / 2; ++i)
    acc.d[t][i] = acc.values[fragment_row(t, i) * acc.n + fragment_column(t, i)];
}

void touched_in_flight(const WgmmaOperation& op) {
  finding("accumulator touched in flight", op.where,
          "the accumulators of this wgmma were changed before a wgmma_wait for it");
}

void check_a_registers(const WgmmaOperation& op, int t) {
  if (std::memcmp(op.a_registers[t], op.a_at_issue[t], 16))
    finding("A registers changed in flight", op.where,
            "the A registers of this wgmma were changed before a wgmma_wait for it");
}

bool covers(std::initializer_list<Registers> pinned, const void* registers, size_t bytes) {
  const auto* begin = static_cast<const char*>(registers);
  return std::any_of(pinned.begin(), pinned.end(), [&](const Registers& r) {
    const auto* from = static_cast<const char*>(r.begin);
    return from <= begin && begin + bytes <= from + r.bytes;
  });
}

void check_descriptor(Cta& cta, uint64_t bits, const char* operand, bool mn_major, int rows, const Where& where) {
  const Descriptor d(bits);
  const std::string name = std::string("descriptor of ") + operand;
  if (bits & ~(uint64_t(3) << 62 | uint64_t(0x3fff) << 32 | uint64_t(0x3fff) << 16 | 0x3fff)) {
    finding("wgmma descriptor", where, name + " has other bits set than address, offsets and swizzle");
    give_up();
  }
  if (d.swizzle != ptx::Swizzle::None && d.start % (8 * ptx::swizzle_width(d.swizzle)) / 128) {
    finding("wgmma descriptor", where,
            name + " starts at " + hex(d.start) + ", not in the first 128 bytes of a swizzle atom of 8 rows");
    give_up();
  }
  for_each_chunk(d, mn_major, rows, [&](uint32_t address, int, int) {
    if (address >= SHARED_BASE && address + 16 <= SHARED_BASE + cta.memory.size()) return;
    finding("shared memory out of range", where, name + " reaches " + hex(address));
    give_up();
  });
}

// Warp w reads rows 16w to 16w + 15 of A; every warp reads all of B.
void remember_reads(Cta& cta, Warpgroup& warpgroup, WgmmaOperation& op, size_t number) {
  Actor actor;
  actor.agent = warpgroup.agent;
  actor.time = number + 1;
  actor.doing = op.shape.a_in_registers ? "wgmma_rs" : "wgmma_ss";
  actor.where = op.where;
  actor.async_proxy = true;
  Clock by_warp[4];
  ClockMeet by_all;
  for (int w = 0; w < 4; ++w) by_all.add(by_warp[w] = op.known[w].take());
  if (!op.shape.a_in_registers) {
    check_descriptor(cta, op.a, "A", op.shape.a_mn_major, M, op.where);
    for_each_chunk(Descriptor(op.a), op.shape.a_mn_major, M, [&](uint32_t address, int m, int) {
      actor.known = by_warp[m / 16];
      cta.shadow.read(address, 16, actor);
    });
  }
  check_descriptor(cta, op.b, "B", op.shape.b_mn_major, op.shape.n, op.where);
  actor.known = by_all.take();
  for_each_chunk(Descriptor(op.b), op.shape.b_mn_major, op.shape.n,
                 [&](uint32_t address, int, int) { cta.shadow.read(address, 16, actor); });
}

bool same(const WgmmaShape& a, const WgmmaShape& b) {
  return a.n == b.n && a.type == b.type && a.a_in_registers == b.a_in_registers && a.a_mn_major == b.a_mn_major &&
         a.b_mn_major == b.b_mn_major && a.accumulate == b.accumulate;
}

// The thread's accumulators go to the tensor core, and are poison to the thread until it waits.
void hand_over(Thread& thread, WgmmaOperation& op, float* d, size_t number) {
  const int t = thread.index % 128, n = op.shape.n;
  auto& in_flight = thread.wgmma.in_flight;
  const auto held = std::find_if(in_flight.begin(), in_flight.end(),
                                 [&](const WgmmaThread::InFlight& f) { return f.accumulator->d[t] == d; });
  if (held != in_flight.end()) {
    if (held->accumulator->n != n || (op.d && op.d != held->accumulator)) {
      finding("wgmma not uniform", op.where,
              "the accumulators are in flight with another shape, or not in the other threads");
      give_up();
    }
    op.d = held->accumulator;
    held->last = number;
    return;
  }
  if (!op.d) {
    op.d = std::make_shared<Accumulator>();
    op.d->n = n;
    op.d->values.resize(M * n);
  }
  op.d->d[t] = d;
  for (int i = 0; i < n / 2; ++i) {
    op.d->values[fragment_row(t, i) * n + fragment_column(t, i)] = d[i];
    std::memcpy(d + i, &ACCUMULATOR_POISON, 4);
  }
  in_flight.push_back({op.d, number});
}

}  // namespace

void wgmma_fence() { current().wgmma.fenced = true; }

void wgmma_issue(const WgmmaShape& shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                 const Where& where) {
  maybe_yield();
  Thread& thread = current();
  Cta& cta = *thread.cta;
  Warpgroup& warpgroup = cta.warpgroup_of(thread);
  const int t = thread.index % 128;
  if (thread.index / 128 * 128 + 128 > cta.threads.size()) {
    finding("wgmma: warpgroup", where, "the CTA's last warpgroup has fewer than 128 threads");
    give_up();
  }
  if (!thread.wgmma.fenced) {
    finding("missing wgmma_fence", where, "no wgmma_fence since the latest wgmma_commit or wgmma_wait");
    thread.wgmma.fenced = true;
  }
  const size_t number = thread.wgmma.issued++;
  if (number == warpgroup.end()) {
    warpgroup.operations.emplace_back();
    WgmmaOperation& op = warpgroup.operations.back();
    op.shape = shape;
    op.a = a;
    op.b = b;
    op.where = where;
  }
  WgmmaOperation& op = warpgroup.operation(number);
  if (!same(op.shape, shape) || op.a != a || op.b != b) {
    finding("wgmma not uniform", where,
            "the threads of a warpgroup give it different operands (the others at " + to_string(op.where) + ")");
    give_up();
  }
  op.known[t / 32].add(thread.known, thread.agent, thread.time);
  hand_over(thread, op, d, number);
  if (a_registers) {
    op.a_registers[t] = a_registers;
    std::memcpy(op.a_at_issue[t], a_registers, 16);
  }
  if (++op.issued < 128) return;
  remember_reads(cta, warpgroup, op, number);
  if (runs_at_once())
    while (warpgroup.can_execute()) wgmma_execute(cta, warpgroup);
}

void wgmma_commit(const Where& where) {
  WgmmaThread& wgmma = current().wgmma;
  Warpgroup& warpgroup = current().cta->warpgroup_of(current());
  wgmma.fenced = false;
  const size_t group = wgmma.groups++;
  if (group == warpgroup.group_ends.size()) warpgroup.group_ends.push_back(wgmma.issued);
  if (warpgroup.group_ends[group] == wgmma.issued) return;
  finding("wgmma not uniform", where, "the threads of a warpgroup commit different operations");
  give_up();
}

void wgmma_wait(int groups, std::initializer_list<Registers> pinned, const Where& where) {
  maybe_yield();
  Thread& thread = current();
  WgmmaThread& wgmma = thread.wgmma;
  Warpgroup& warpgroup = thread.cta->warpgroup_of(thread);
  const int t = thread.index % 128;
  const size_t keep = static_cast<size_t>(groups);
  const size_t target = wgmma.groups > keep ? warpgroup.group_ends[wgmma.groups - keep - 1] : 0;
  wgmma.fenced = false;
  wait_until(warpgroup.waiters, {"wgmma_wait", static_cast<uint32_t>(groups), where}, [&] {
    warpgroup.wanted = std::max(warpgroup.wanted, target);
    return warpgroup.executed >= target;
  });
  for (; wgmma.waited < target; ++wgmma.waited) {
    WgmmaOperation& op = warpgroup.operation(wgmma.waited);
    if (op.shape.a_in_registers) {
      if (covers(pinned, op.a_registers[t], 16)) check_a_registers(op, t);
      else
        finding("wgmma_wait does not pin", where,
                "the A registers of the wgmma_rs at " + to_string(op.where) + " have to be among its arguments");
    }
    ++op.passed;
  }
  while (!warpgroup.operations.empty() && warpgroup.operations.front().passed == 128) {
    warpgroup.operations.pop_front();
    ++warpgroup.first;
  }
  for (size_t i = 0; i < wgmma.in_flight.size();) {
    auto& flight = wgmma.in_flight[i];
    if (flight.last >= target) {
      ++i;
      continue;
    }
    Accumulator& acc = *flight.accumulator;
    if (!untouched(acc, t))
      finding("accumulator touched in flight", where,
              "the accumulators this wait is for were changed between the wgmma and the wait");
    if (!covers(pinned, acc.d[t], 4 * acc.n / 2))
      finding("wgmma_wait does not pin", where, "an accumulator array it waits for has to be among its arguments");
    show(acc, t);
    acc.d[t] = nullptr;
    flight = wgmma.in_flight.back();
    wgmma.in_flight.pop_back();
  }
  if (target) thread.learn(with(thread.known, warpgroup.agent, target));
}

void wgmma_execute(Cta& cta, Warpgroup& warpgroup) {
  static float a[M * K], b[K * MAX_N];
  WgmmaOperation& op = warpgroup.operation(warpgroup.executed++);
  const WgmmaShape& shape = op.shape;
  Accumulator& acc = *op.d;
  if (shape.a_in_registers) {
    for (int t = 0; t < 128; ++t) {
      check_a_registers(op, t);
      for (int j = 0; j < 4; ++j)
        for (int e = 0; e < 2; ++e)
          a[(16 * (t / 32) + t % 32 / 4 + 8 * (j & 1)) * K + 2 * (t % 4) + 8 * (j >> 1) + e] =
              to_float(op.a_registers[t][j] >> (16 * e), shape.type);
    }
  } else {
    load_operand(cta, Descriptor(op.a), shape.a_mn_major, M, shape.type, a, K, 1);
  }
  load_operand(cta, Descriptor(op.b), shape.b_mn_major, shape.n, shape.type, b, 1, shape.n);
  for (int t = 0; t < 128; ++t)
    if (acc.d[t] && !untouched(acc, t)) touched_in_flight(op);
  if (!shape.accumulate) std::fill(acc.values.begin(), acc.values.end(), 0.f);
  multiply(a, b, acc.values.data(), shape.n);
  if (machine->schedule == Schedule::Eager) {
    acc.shown = true;
    for (int t = 0; t < 128; ++t)
      if (acc.d[t]) show(acc, t);
  }
  warpgroup.waiters.wake();
}

void wgmma_thread_exit(Thread& thread) {
  const WgmmaThread& wgmma = thread.wgmma;
  if (wgmma.waited == wgmma.issued) return;
  Warpgroup& warpgroup = thread.cta->warpgroup_of(thread);
  finding("wgmma never waited for", warpgroup.operation(wgmma.waited).where,
          "the thread exits with no wgmma_wait for it");
}

}  // namespace emulator
