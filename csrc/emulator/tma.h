// Tensor maps, and the boxes and bulk reductions that TMA carries out asynchronously.
#pragma once
#include <emulator/clock.h>
#include <emulator/scheduler.h>
#include <ptx/layout.h>
#include <ptx/types.h>

namespace emulator {

struct Cta;

struct alignas(64) TensorMap {
  uint8_t* base = nullptr;
  ptx::ElementType type = ptx::ElementType::Bf16;
  ptx::Swizzle swizzle = ptx::Swizzle::None;
  int rank = 0;
  uint32_t box[5] = {1, 1, 1, 1, 1};
  uint64_t sizes[5] = {1, 1, 1, 1, 1};    // elements, innermost first
  uint64_t strides[5] = {0, 0, 0, 0, 0};  // bytes

  uint32_t element_bytes() const { return type == ptx::ElementType::Fp32 ? 4 : 2; }
  uint32_t box_bytes() const { return element_bytes() * box[0] * box[1] * box[2] * box[3] * box[4]; }
};

TensorMap make_tensor_map(ptx::ElementType type, void* base, int rank, const uint64_t* sizes,
                          const uint64_t* strides_bytes, const uint32_t* box, ptx::Swizzle swizzle);

struct Coordinates { int rank; int c[5]; };

void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at, const Where& where);
void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, uint16_t cta_mask, Coordinates at,
                        const Where& where);
void tma_store(const TensorMap* map, uint32_t src, Coordinates at, const Where& where);
void bulk_reduce_add(float* global, uint32_t src, uint32_t bytes, const Where& where);
void bulk_commit();
void bulk_wait(int groups, bool only_reads, const Where& where);

// A load, a store or a reduction that has been issued and is not over.
struct BulkOperation {
  enum class Kind { Load, Store, ReduceAdd } kind;
  TensorMap map;
  Coordinates at;
  uint32_t shared = 0;
  uint32_t bytes = 0;
  float* global = nullptr;  // ReduceAdd
  uint32_t bar = 0;
  std::vector<Cta*> targets;       // Load: the CTAs that receive it, and the phase of each one's barrier at issue
  std::vector<uint32_t> phases;
  Thread* thread = nullptr;        // that issued it
  uint32_t serial = 0;             // among the stores of the thread, from 1
  std::vector<uint8_t> data;       // Store, ReduceAdd: what was read, row by row without swizzle
  bool has_read = false;
  Where where;
};

// The stores of one thread.
struct BulkThread {
  Agent agent = 0;
  uint32_t issued = 0;       // stores so far
  uint32_t committed = 0;    // of them, in closed groups
  uint32_t waited_read = 0;  // of them, known to have read
  std::vector<uint32_t> groups;  // stores issued up to the end of each group
  std::vector<Where> where;      // of each store
  WaitList waiters;
};

bool bulk_step(BulkOperation& operation);  // the operation's next step; true when it is over
void bulk_thread_exit(Thread& thread);

}  // namespace emulator
