// A stack of its own that code runs on until it changes to another. On x86-64 a change keeps the registers that a call keeps, and no
// more: swapcontext also asks the system for the signal mask, and that is most of what a run costs.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host {

#if defined(__x86_64__)

struct Context {
  void* top = nullptr;  // of the stack, where the registers lie
};

extern "C" void blip3o_host_change(void** from, void* to);
asm(R"(
.text
.type blip3o_host_change, @function
blip3o_host_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size blip3o_host_change, .-blip3o_host_change
)");

inline void prepare(Context& context, void* low, size_t size, void (*start)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(low) + size) & ~uintptr_t{15});
  *--top = nullptr;  // where `start` would return to
  *--top = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.top = top;
}
inline void change(Context& from, Context& to) { blip3o_host_change(&from.top, to.top); }

#else

struct Context {
  ucontext_t registers;
};

inline void prepare(Context& context, void* low, size_t size, void (*start)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = low;
  context.registers.uc_stack.ss_size = size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, start, 0);
}
inline void change(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#endif

}  // namespace host
