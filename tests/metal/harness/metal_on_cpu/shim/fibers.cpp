// Lanes are fibers: the callee-saved registers on the stack, and the stack pointer swapped. x86-64 and arm64.
#include <string.h>

#include "machine.h"

#if defined(__APPLE__)
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif

extern "C" void msl_switch(void** save, void* load);
extern "C" void msl_fiber_main();

#if defined(__x86_64__)
asm(".text\n.globl " SYMBOL("msl_switch") "\n" SYMBOL("msl_switch") ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
void* msl::fresh_stack(u8* top) {
    void** at = (void**)((u64)top & ~u64(15));
    *--at = nullptr;  // the entry sees a stack that is 8 modulo 16, as after a call
    *--at = (void*)msl_fiber_main;
    for (int i = 0; i < 6; i++) *--at = nullptr;
    return at;
}
#elif defined(__aarch64__)
asm(".text\n.globl " SYMBOL("msl_switch") "\n.p2align 2\n" SYMBOL("msl_switch") ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
void* msl::fresh_stack(u8* top) {
    u8* at = (u8*)((u64)top & ~u64(15)) - 160;
    memset(at, 0, 160);
    void* entry = (void*)msl_fiber_main;
    memcpy(at + 88, &entry, 8);
    return at;
}
#else
#error "fibers are written for x86-64 and arm64"
#endif

void msl::suspend(State state) {
    Lane& lane = m.lanes[m.current];
    lane.state = state;
    m.inside = false;
    msl_switch(&lane.stack_pointer, m.scheduler);
}

void msl::resume(u32 index) {
    m.current = index;
    m.inside = true;
    msl_switch(&m.scheduler, m.lanes[index].stack_pointer);
    m.inside = false;
}
