#include <emulator/fiber.h>

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 4096;

std::vector<void*>& free_stacks() {
  static std::vector<void*> stacks;
  return stacks;
}

void* allocate_stack() {
  if (!free_stacks().empty()) {
    void* stack = free_stacks().back();
    free_stacks().pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, GUARD_BYTES, PROT_NONE);
  return stack;
}

}  // namespace

#if defined(__x86_64__)

// Saves the callee-saved registers of the System V ABI on this stack, and takes them from the other.
__attribute__((naked, noinline)) static void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret");
}

void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = allocate_stack();
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + STACK_BYTES - 64);
  *--top = nullptr;  // the return address of entry, never used; keeps the ABI's alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context_ = top;
}
void Fiber::resume() { switch_stack(&scheduler_, context_); }
void Fiber::suspend() { switch_stack(&context_, scheduler_); }

Fiber::~Fiber() {
  if (stack_) free_stacks().push_back(stack_);
}

#else

void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = allocate_stack();
  if (!context_) context_ = new ucontext_t;
  if (!scheduler_) scheduler_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(context_);
  getcontext(context);
  context->uc_stack.ss_sp = static_cast<char*>(stack_) + GUARD_BYTES;
  context->uc_stack.ss_size = STACK_BYTES - GUARD_BYTES;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
void Fiber::resume() { swapcontext(static_cast<ucontext_t*>(scheduler_), static_cast<ucontext_t*>(context_)); }
void Fiber::suspend() { swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(scheduler_)); }

Fiber::~Fiber() {
  delete static_cast<ucontext_t*>(context_);
  delete static_cast<ucontext_t*>(scheduler_);
  if (stack_) free_stacks().push_back(stack_);
}

#endif

}  // namespace emulator
