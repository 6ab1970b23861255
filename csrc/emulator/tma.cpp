#include <emulator/machine.h>
#include <emulator/shared_memory.h>
#include <emulator/tma.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace emulator {

namespace {

constexpr uint32_t CHUNK = 16;  // bytes that stay together under every swizzle

[[noreturn]] void refuse(const std::string& why) { throw std::runtime_error("make_tensor_map: " + why); }

uint32_t atom_bytes(ptx::Swizzle s) { return s == ptx::Swizzle::None ? 128 : 8 * ptx::swizzle_width(s); }

// f(offset of the row in the box, its elements [begin, end) that are in bounds, address of element `begin`)
template <class F> void for_each_row(const BulkOperation& op, F f) {
  const TensorMap& m = op.map;
  const int64_t c0 = op.at.c[0], size0 = static_cast<int64_t>(m.sizes[0]), box0 = m.box[0];
  const int64_t begin = std::min(std::max<int64_t>(0, -c0), box0);
  const int64_t end = std::max(begin, std::min(box0, size0 - c0));
  uint32_t offset = 0, i[5] = {};
  for (i[4] = 0; i[4] < m.box[4]; ++i[4])
    for (i[3] = 0; i[3] < m.box[3]; ++i[3])
      for (i[2] = 0; i[2] < m.box[2]; ++i[2])
        for (i[1] = 0; i[1] < m.box[1]; ++i[1], offset += m.box[0] * m.element_bytes()) {
          uint8_t* row = m.base;
          bool inside = true;
          for (int d = 1; d < m.rank; ++d) {
            const int64_t x = int64_t(op.at.c[d]) + i[d];
            inside = inside && x >= 0 && x < static_cast<int64_t>(m.sizes[d]);
            row += x * static_cast<int64_t>(m.strides[d]);
          }
          f(offset, begin, inside ? end : begin, row + (c0 + begin) * m.element_bytes());
        }
}

void check_box(const TensorMap* map, const Coordinates& at, uint32_t shared, const char* doing, const Where& where) {
  if (map->rank != at.rank) {
    finding("tensor map: rank", where,
            std::string(doing) + " with " + std::to_string(at.rank) + " coordinates of a tensor map of rank " +
                std::to_string(map->rank));
    give_up();
  }
  if (shared % atom_bytes(map->swizzle)) {
    finding("misaligned shared address", where,
            std::string(doing) + " at " + hex(shared) + " has to be aligned to the swizzle's atom of " +
                std::to_string(atom_bytes(map->swizzle)) + " bytes");
    give_up();
  }
}

void load_box(BulkOperation& op) {
  const TensorMap& m = op.map;
  const uint32_t row_bytes = m.box[0] * m.element_bytes();
  std::vector<uint8_t> row(row_bytes);
  for_each_row(op, [&](uint32_t offset, int64_t begin, int64_t end, const uint8_t* global) {
    std::fill(row.begin(), row.end(), 0);
    if (end > begin) std::memcpy(row.data() + begin * m.element_bytes(), global, (end - begin) * m.element_bytes());
    for (uint32_t b = 0; b < row_bytes; b += CHUNK)
      for (Cta* cta : op.targets)
        std::memcpy(cta->at(ptx::swizzle(op.shared + offset + b, m.swizzle)), row.data() + b, CHUNK);
  });
}

void complete_load(BulkOperation& op) {
  load_box(op);
  for (size_t i = 0; i < op.targets.size(); ++i) {
    Cta& cta = *op.targets[i];
    cta.shadow.set_in_flight(op.shared, op.bytes, false);
    const Mbarrier& bar = cta.mbarriers.at(op.bar);
    if (bar.phase != op.phases[i])
      finding("expect_tx too small", op.where,
              "the phase of the barrier at " + hex(op.bar) + " was complete before this load of " +
                  std::to_string(op.bytes) + " bytes was: fewer bytes are expected than loaded");
    mbarrier_complete_bytes(cta, op.bar, op.bytes);
  }
}

void read_source(BulkOperation& op) {
  const Cta& cta = *op.thread->cta;
  op.data.resize(op.bytes);
  for (uint32_t b = 0; b < op.bytes; b += CHUNK)
    std::memcpy(op.data.data() + b, const_cast<Cta&>(cta).at(ptx::swizzle(op.shared + b, op.map.swizzle)), CHUNK);
  op.has_read = true;
}

void write_destination(BulkOperation& op) {
  if (op.kind == BulkOperation::Kind::ReduceAdd) {
    const auto* addend = reinterpret_cast<const float*>(op.data.data());
    for (uint32_t i = 0; i < op.bytes / 4; ++i) op.global[i] += addend[i];
    return;
  }
  const uint32_t e = op.map.element_bytes();
  for_each_row(op, [&](uint32_t offset, int64_t begin, int64_t end, uint8_t* global) {
    if (end > begin) std::memcpy(global, op.data.data() + offset + begin * e, (end - begin) * e);
  });
}

void issue(std::unique_ptr<BulkOperation> op) {
  BulkOperation& issued = *op;
  machine->bulk.push_back(std::move(op));
  if (!runs_at_once()) return;
  while (!bulk_step(issued)) continue;
  machine->bulk.pop_back();
}

// A store or reduction whose source the actor reads from now on.
void issue_store(std::unique_ptr<BulkOperation> op, const char* doing) {
  Thread& thread = current();
  BulkThread& bulk = thread.bulk;
  Cta& cta = *thread.cta;
  if (!bulk.issued) bulk.agent = cta.cluster->add_agent(AgentInfo::Kind::BulkStore, &cta, thread.index);
  op->serial = ++bulk.issued;
  bulk.where.push_back(op->where);
  Actor actor = thread.actor(doing, op->where);
  actor.agent = bulk.agent;
  actor.time = op->serial;
  actor.async_proxy = true;
  if (op->kind == BulkOperation::Kind::ReduceAdd) {
    cta.shadow.read(op->shared, op->bytes, actor);
  } else {
    const TensorMap& m = op->map;
    const uint32_t e = m.element_bytes();
    for_each_row(*op, [&](uint32_t offset, int64_t begin, int64_t end, const uint8_t*) {
      for (uint32_t b = 0; b < m.box[0] * e; b += CHUNK) {  // what lies out of bounds is not used
        const uint32_t from = std::max<int64_t>(b, begin * e), to = std::min<int64_t>(b + CHUNK, end * e);
        if (from < to) cta.shadow.read(ptx::swizzle(op->shared + offset + b, m.swizzle) + from - b, to - from, actor);
      }
    });
  }
  issue(std::move(op));
}

}  // namespace

TensorMap make_tensor_map(ptx::ElementType type, void* base, int rank, const uint64_t* sizes,
                          const uint64_t* strides_bytes, const uint32_t* box, ptx::Swizzle swizzle) {
  TensorMap m;
  m.base = static_cast<uint8_t*>(base);
  m.type = type;
  m.swizzle = swizzle;
  m.rank = rank;
  if (rank < 1 || rank > 5) refuse("a rank is 1 to 5, not " + std::to_string(rank));
  if (reinterpret_cast<uintptr_t>(base) % 16) refuse("the base is a multiple of 16 bytes");
  for (int d = 0; d < rank; ++d) {
    if (sizes[d] < 1 || sizes[d] > uint64_t(1) << 32) refuse("sizes are 1 to 2^32, not " + std::to_string(sizes[d]));
    if (box[d] < 1 || box[d] > 256) refuse("box sides are 1 to 256, not " + std::to_string(box[d]));
    m.sizes[d] = sizes[d];
    m.box[d] = box[d];
    if (d == 0) continue;
    const uint64_t stride = strides_bytes[d - 1];
    if (stride % 16 || stride >= uint64_t(1) << 40)
      refuse("strides are multiples of 16 bytes below 2^40, not " + std::to_string(stride));
    m.strides[d] = stride;
  }
  const uint32_t row_bytes = box[0] * m.element_bytes();
  if (row_bytes % 16) refuse("a box's row is a multiple of 16 bytes, not " + std::to_string(row_bytes));
  if (swizzle != ptx::Swizzle::None && row_bytes > ptx::swizzle_width(swizzle))
    refuse("a box's row of " + std::to_string(row_bytes) + " bytes is wider than the swizzle's " +
           std::to_string(ptx::swizzle_width(swizzle)));
  return m;
}

static void load(std::vector<Cta*> targets, uint32_t dst, const TensorMap* map, uint32_t bar, const Coordinates& at,
                 const char* doing, const Where& where) {
  Thread& thread = current();
  check_box(map, at, dst, doing, where);
  auto op = std::make_unique<BulkOperation>();
  op->kind = BulkOperation::Kind::Load;
  op->map = *map;
  op->at = at;
  op->shared = dst;
  op->bytes = map->box_bytes();
  op->bar = bar;
  op->thread = &thread;
  op->where = where;
  op->targets = std::move(targets);
  for (Cta* cta : op->targets) {
    check_range(*cta, dst, op->bytes, 16, doing, where);
    const Mbarrier& barrier = use_mbarrier(*cta, bar, true, doing, where);
    op->phases.push_back(barrier.phase);
    Actor actor = thread.actor(doing, where);
    actor.agent = barrier.agent;
    actor.time = barrier.phase + 1;
    actor.async_proxy = true;
    cta->shadow.write(dst, op->bytes, actor);
    cta->shadow.set_in_flight(dst, op->bytes, true);
    must_outlive(*cta, actor.agent, actor.time, doing, where);
    std::memset(cta->at(dst), POISON_BYTE, op->bytes);
  }
  issue(std::move(op));
}

void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at, const Where& where) {
  maybe_yield();
  load({current().cta}, dst, map, bar, at, "tma_load", where);
}

void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, uint16_t cta_mask, Coordinates at,
                        const Where& where) {
  maybe_yield();
  std::vector<Cta*> targets;
  for (uint32_t rank = 0; rank < 16; ++rank)
    if (cta_mask >> rank & 1) targets.push_back(&remote_cta(rank, "tma_load_multicast", where));
  load(std::move(targets), dst, map, bar, at, "tma_load_multicast", where);
}

void tma_store(const TensorMap* map, uint32_t src, Coordinates at, const Where& where) {
  maybe_yield();
  check_box(map, at, src, "tma_store", where);
  check_range(*current().cta, src, map->box_bytes(), 16, "tma_store", where);
  auto op = std::make_unique<BulkOperation>();
  op->kind = BulkOperation::Kind::Store;
  op->map = *map;
  op->at = at;
  op->shared = src;
  op->bytes = map->box_bytes();
  op->thread = &current();
  op->where = where;
  issue_store(std::move(op), "tma_store");
}

void bulk_reduce_add(float* global, uint32_t src, uint32_t bytes, const Where& where) {
  maybe_yield();
  check_range(*current().cta, src, bytes, 16, "bulk_reduce_add", where);
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    finding("bulk_reduce_add: alignment", where, "the global address and the size are multiples of 16 bytes");
    give_up();
  }
  auto op = std::make_unique<BulkOperation>();
  op->kind = BulkOperation::Kind::ReduceAdd;
  op->shared = src;
  op->bytes = bytes;
  op->global = global;
  op->thread = &current();
  op->where = where;
  issue_store(std::move(op), "bulk_reduce_add");
}

void bulk_commit() {
  BulkThread& bulk = current().bulk;
  bulk.committed = bulk.issued;
  bulk.groups.push_back(bulk.issued);
}

void bulk_wait(int groups, bool only_reads, const Where& where) {
  maybe_yield();
  Thread& thread = current();
  BulkThread& bulk = thread.bulk;
  const size_t closed = bulk.groups.size(), keep = static_cast<size_t>(groups);
  const uint32_t target = closed > keep ? bulk.groups[closed - keep - 1] : 0;
  const auto unfinished = [&](const std::unique_ptr<BulkOperation>& op) {
    return op->thread == &thread && op->serial && op->serial <= target && !(only_reads && op->has_read);
  };
  wait_until(bulk.waiters, {only_reads ? "tma_store_wait_read" : "tma_store_wait", 0, where},
             [&] { return std::none_of(machine->bulk.begin(), machine->bulk.end(), unfinished); });
  bulk.waited_read = std::max(bulk.waited_read, target);
  if (target) thread.learn(with(thread.known, bulk.agent, target));
}

bool bulk_step(BulkOperation& op) {
  if (op.kind == BulkOperation::Kind::Load) {
    complete_load(op);
    return true;
  }
  op.thread->bulk.waiters.wake();
  if (!op.has_read) {
    read_source(op);
    return false;
  }
  write_destination(op);
  return true;
}

void bulk_thread_exit(Thread& thread) {
  const BulkThread& bulk = thread.bulk;
  if (bulk.committed < bulk.issued)
    finding("store never committed", bulk.where[bulk.issued - 1], "no tma_store_commit follows it");
  else if (bulk.waited_read < bulk.issued)
    finding("store not waited for", bulk.where[bulk.issued - 1],
            "its thread exits with no tma_store_wait_read after it: the CTA's shared memory may be gone before it is "
            "read");
}

}  // namespace emulator
