// Runs a translated kernel: every lane is a fiber, collectives and barriers are where fibers meet, and every memory access
// of the kernel is reported here by the compiler's thread-sanitizer instrumentation (this file is its whole runtime).
//
// Owns scheduling and the checks: bounds, writes to inputs, uninitialised reads, races, divergence. Not thread-safe: one
// run at a time in a module. What Metal's types and functions mean is metal_stdlib.h's.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

namespace {

enum Kind { kNone, kOutOfBounds, kInputWrite, kUninitialised, kRace, kDivergence, kMisaligned, kUndefined, kTooMuchMemory };
enum Mode { kRead, kWrite, kUpdate };  // an update reads and writes
enum State { kReady, kSimd, kBarrier, kDone };

constexpr u32 kWidth = 32, kMaxLanes = 1024, kStackBytes = 256 << 10, kDepth = 128, kRedZone = 256, kMaxDeclarations = 64,
              kMaxBuffers = 32;
constexpr u64 kApart = u64(4) << 30, kCopied = 64 << 20;
constexpr u32 kSpaces[] = {kMemDevice, kMemThreadgroup};
constexpr u32 kMany = 0xffffffff, kManyOfSimd = 0x80000000;

// Who last wrote and read one byte. Groups are numbered from 1 within a run, 0: nobody.
struct Access {
    u32 group, lane, epoch, simd_epoch;
    bool atomic;
};
struct Cell {
    Access wrote, read;
};

struct Region {
    u8* begin;
    u64 bytes;
    i32 index;
    bool output, initialised;
    Cell* cells;
    u8* written;
};

struct Lane {
    void* stack_pointer;
    u8* stack;
    State state;
    u32 line;
    u64 site;
    u32 flags;
    MslTicket* ticket;
    u32 depth;
    u64 path[kDepth];
    MslIds ids;
};

struct Machine {
    MslRun* run;
    Region* regions;
    Region* recent;
    Region memory;  // threadgroup memory
    void* arguments[kMaxBuffers];
    u8* apart;
    Lane* lanes;
    u8 *stacks, *module, *constants_begin, *constants_end;
    u64 stack_bytes;
    u32 lane_count, current, group;
    u32 epoch[3], simd_epoch[3][kMaxLanes / kWidth];  // by memory flag
    u32 used;
    struct { u64 bytes; u32 offset; } declarations[kMaxDeclarations];
    void* scheduler;
    bool inside, failed;
} m;

}  // namespace

// --- fibers: the callee-saved registers on the stack, and the stack pointer swapped ----------------------------------

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
static void* fresh_stack(u8* top) {
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
static void* fresh_stack(u8* top) {
    u8* at = (u8*)((u64)top & ~u64(15)) - 160;
    memset(at, 0, 160);
    void* entry = (void*)msl_fiber_main;
    memcpy(at + 88, &entry, 8);
    return at;
}
#else
#error "fibers are written for x86-64 and arm64"
#endif

namespace {

void suspend(State state) {
    Lane& lane = m.lanes[m.current];
    lane.state = state;
    m.inside = false;
    msl_switch(&lane.stack_pointer, m.scheduler);
}

void resume(u32 index) {
    m.current = index;
    m.inside = true;
    msl_switch(&m.scheduler, m.lanes[index].stack_pointer);
    m.inside = false;
}

// --- reports ---------------------------------------------------------------------------------------------------------

MslReport& note(Kind kind, u32 line, const char* text) {
    MslReport& report = m.run->report;
    memset(&report, 0, sizeof report);
    report.kind = kind;
    report.buffer = -2;
    report.lane = i32(m.current);
    report.other = -1;
    report.line = i32(line);
    memcpy(report.group, m.lanes[m.current].ids.threadgroup_position_in_grid, sizeof report.group);
    snprintf(report.text, sizeof report.text, "%s", text);
    m.failed = true;
    return report;
}

// Called inside a lane; never returns to it.
void stop_at(Kind kind, const Region* region, u64 address, u32 bytes, bool write, i32 other, u64 pc, const char* text,
             u32 line = 0) {
    MslReport& report = note(kind, line, text);
    report.buffer = region ? region->index : -2;
    report.offset = region ? i64(address - u64(region->begin)) : 0;
    report.bytes = i32(bytes);
    report.write = write;
    report.other = other < 0 || other >= i32(kMaxLanes) ? -1 : other;
    report.pc = pc ? pc - u64(m.module) : 0;
    suspend(kDone);
}

// --- memory ----------------------------------------------------------------------------------------------------------

bool ordered(const Access& before, u32 space) {
    if (before.epoch != m.epoch[space]) return true;
    u32 simd = before.lane & kManyOfSimd ? before.lane & ~kManyOfSimd : before.lane / kWidth;
    return before.lane != kMany && simd == m.current / kWidth && before.simd_epoch != m.simd_epoch[space][simd];
}

bool conflicts(const Access& before, u32 space, bool atomic) {
    if (before.group == 0 || (before.atomic && atomic)) return false;
    if (before.group != m.group) return space == kMemDevice;
    return before.lane != m.current && !ordered(before, space);
}

Access now(u32 space, bool atomic) {
    return {m.group, m.current, m.epoch[space], m.simd_epoch[space][m.current / kWidth], atomic};
}

// Readers that came one after the other are kept as one, or as many of a simdgroup, of the threadgroup or of the grid.
void add_reader(Access& read, u32 space, bool atomic) {
    Access mine = now(space, atomic);
    if (space == kMemDevice && read.group && read.group != m.group) {
        read.group = kMany;
        return;
    }
    bool joins = read.group == m.group && read.epoch == mine.epoch && read.lane != m.current;
    if (!joins) {
        read = mine;
        return;
    }
    u32 simd = m.current / kWidth;
    bool same = read.lane != kMany && (read.lane & kManyOfSimd ? (read.lane & ~kManyOfSimd) : read.lane / kWidth) == simd;
    if (same && read.simd_epoch != mine.simd_epoch) read = mine;
    else read.lane = same ? kManyOfSimd | simd : kMany;
    read.atomic = read.atomic && atomic;
}

void check_cells(Region& region, u64 address, u32 bytes, Mode mode, bool atomic, u64 pc) {
    bool write = mode != kRead;
    bool shared = &region == &m.memory;
    u32 space = shared ? kMemThreadgroup : kMemDevice;
    u64 first = address - u64(region.begin);
    for (u64 i = first; i < first + bytes; i++) {
        Cell& cell = region.cells[i];
        bool defined = shared ? cell.wrote.group == m.group : region.initialised || cell.wrote.group;
        if (mode != kWrite && !defined)
            stop_at(kUninitialised, &region, address, bytes, write, -1, pc, "reads what nothing has written");
        if (conflicts(cell.wrote, space, atomic))
            stop_at(kRace, &region, address, bytes, write, i32(cell.wrote.lane), pc,
                    cell.wrote.group == m.group ? "written by another lane, no barrier between"
                                                : "written by another threadgroup of the same dispatch");
        if (write && conflicts(cell.read, space, atomic))
            stop_at(kRace, &region, address, bytes, write, i32(cell.read.lane), pc,
                    cell.read.group == m.group ? "read by another lane, no barrier between"
                                               : "read by another threadgroup of the same dispatch");
        if (write) {
            cell.wrote = now(space, atomic);
            if (region.written) region.written[i] = 1;
        } else {
            add_reader(cell.read, space, atomic);
        }
    }
}

bool inside(const Region& region, u64 address) { return address - u64(region.begin) < region.bytes; }

Region* find(u64 address) {
    if (m.recent && inside(*m.recent, address)) return m.recent;
    if (inside(m.memory, address)) return &m.memory;
    for (i32 i = 0; i < m.run->count; i++)
        if (inside(m.regions[i], address)) return m.recent = &m.regions[i];
    return nullptr;
}

Region* nearest(u64 address) {
    Region* best = nullptr;
    u64 least = kApart / 2;
    for (i32 i = -1; i < m.run->count; i++) {
        Region& region = i < 0 ? m.memory : m.regions[i];
        u64 begin = u64(region.begin), end = begin + region.bytes;
        u64 distance = address < begin ? begin - address : address - end;
        if (distance < least) least = distance, best = &region;
    }
    return best;
}

u8* module_of(const void* at) {
    Dl_info info;
    return dladdr(at, &info) ? (u8*)info.dli_fbase : nullptr;
}

// Whether an address is one of the program's own constants; asking the loader is slow, so the stretch found is kept.
bool in_module(u64 address) {
    u8* at = (u8*)address;
    if (at >= m.constants_begin && at < m.constants_end) return true;
    if (module_of(at) != m.module) return false;
    if (!m.constants_begin || at < m.constants_begin) m.constants_begin = at;
    if (at >= m.constants_end) m.constants_end = at + 1;
    return true;
}

bool of_declaration(u64 offset, u32 bytes) {
    for (u32 i = 0; i < kMaxDeclarations; i++) {
        u64 begin = m.declarations[i].offset;
        if (m.declarations[i].bytes && offset >= begin && offset + bytes <= begin + m.declarations[i].bytes) return true;
    }
    return false;
}

void check(u64 address, u32 bytes, Mode mode, bool atomic, u64 pc) {
    bool write = mode != kRead;
    m.run->accesses++;
    if (address - u64(m.stacks) < m.stack_bytes) return;
    Region* region = find(address);
    if (!region) {
        if (!in_module(address)) stop_at(kOutOfBounds, nearest(address), address, bytes, write, -1, pc, "outside every buffer");
        if (write) stop_at(kInputWrite, nullptr, address, bytes, write, -1, pc, "writes to a program-scope constant");
        return;
    }
    if (address + bytes > u64(region->begin) + region->bytes ||
        (region == &m.memory && !of_declaration(address - u64(region->begin), bytes)))
        stop_at(kOutOfBounds, region, address, bytes, write, -1, pc, "beyond the end");
    if (region->cells) check_cells(*region, address, bytes, mode, atomic, pc);
    else if (write) stop_at(kInputWrite, region, address, bytes, write, -1, pc, "writes to an input");
}

}  // namespace

// --- what the instrumented kernel calls ------------------------------------------------------------------------------

extern "C" {

#define PC u64(__builtin_return_address(0))
#define READ(name, size) void name(void* at) { if (m.inside) check(u64(at), size, kRead, false, PC); }
#define WRITE(name, size) void name(void* at) { if (m.inside) check(u64(at), size, kWrite, false, PC); }
#define BOTH(size) READ(__tsan_read##size, size) WRITE(__tsan_write##size, size)
BOTH(1) BOTH(2) BOTH(4) BOTH(8) BOTH(16)
#define UNALIGNED(size) READ(__tsan_unaligned_read##size, size) WRITE(__tsan_unaligned_write##size, size)
UNALIGNED(2) UNALIGNED(4) UNALIGNED(8) UNALIGNED(16)
void __tsan_read_range(void* at, unsigned long bytes) { if (m.inside && bytes) check(u64(at), u32(bytes), kRead, false, PC); }
void __tsan_write_range(void* at, unsigned long bytes) { if (m.inside && bytes) check(u64(at), u32(bytes), kWrite, false, PC); }
// Copies of structures may be calls, which the instrumentation leaves to the runtime.
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
    if (m.inside && bytes) check(u64(from), u32(bytes), kRead, false, PC), check(u64(to), u32(bytes), kWrite, false, PC);
    return memmove(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) { return __tsan_memcpy(to, from, bytes); }
void* __tsan_memset(void* to, int value, unsigned long bytes) {
    if (m.inside && bytes) check(u64(to), u32(bytes), kWrite, false, PC);
    return memset(to, value, bytes);
}
void __tsan_init() {}

// The path of calls, so that a collective in a helper is told apart by who called it.
void __tsan_func_entry(void* from) {
    if (!m.inside) return;
    Lane& lane = m.lanes[m.current];
    if (lane.depth + 1 < kDepth) lane.path[lane.depth + 1] = lane.path[lane.depth] * 31 + u64(from);
    lane.depth++;
}
void __tsan_func_exit() {
    if (m.inside) m.lanes[m.current].depth--;
}

#define HANDLER(name) void __ubsan_handle_##name(void* data) { undefined(data, #name); }
static void undefined(void* data, const char* name) {
    if (!m.inside) return;
    u32 line = 0;
    memcpy(&line, (u8*)data + sizeof(char*), 4);  // the source location comes first: file, line, column
    note(kUndefined, line, name);
    suspend(kDone);
}
HANDLER(out_of_bounds) HANDLER(shift_out_of_bounds) HANDLER(divrem_overflow) HANDLER(add_overflow) HANDLER(sub_overflow)
HANDLER(mul_overflow) HANDLER(negate_overflow) HANDLER(float_cast_overflow) HANDLER(builtin_unreachable)
HANDLER(missing_return) HANDLER(load_invalid_value) HANDLER(vla_bound_not_positive) HANDLER(pointer_overflow)
void __ubsan_handle_type_mismatch_v1(void* data, void* at) {
    if (!m.inside) return;
    u32 line = 0;
    memcpy(&line, (u8*)data + sizeof(char*), 4);
    Region* region = find(u64(at));
    stop_at(kMisaligned, region, u64(at), 0, false, -1, 0, "not aligned for its type", line);
}

static void meet(State state, u64 site, u32 line) {
    Lane& lane = m.lanes[m.current];
    lane.site = (lane.path[lane.depth < kDepth ? lane.depth : kDepth - 1] * 31 + line) * 31 + site;
    lane.line = line;
    m.run->collectives++;
    suspend(state);
}

void msl_collective(MslTicket* ticket, u32 line) {
    ticket->lane = m.current % kWidth;
    m.lanes[m.current].ticket = ticket;
    meet(kSimd, u64(ticket->resolve) * 31 + ticket->argument, line);
}

void msl_missing_lane(u32 lane) {
    note(kDivergence, m.lanes[m.current].line, "reads a value from a lane that is not there").other = i32(lane);
}

void msl_simdgroup_barrier(u32 flags, u32 line) {
    m.lanes[m.current].ticket = nullptr;
    m.lanes[m.current].flags = flags;
    meet(kSimd, flags, line);
}

void msl_threadgroup_barrier(u32 flags, u32 line) {
    m.lanes[m.current].flags = flags;
    meet(kBarrier, flags, line);
}

void* msl_threadgroup_memory(u32 declaration, u64 bytes, u64 alignment) {
    if (declaration >= kMaxDeclarations) {
        note(kTooMuchMemory, 0, "more threadgroup declarations than the harness keeps");
        suspend(kDone);
    }
    auto& found = m.declarations[declaration];
    if (!found.bytes) {
        u32 offset = u32((m.memory.bytes ? m.used + kRedZone : kRedZone) + alignment - 1) & ~u32(alignment - 1);
        m.run->peak_threadgroup_bytes += bytes;
        if (m.run->peak_threadgroup_bytes > m.run->threadgroup_bytes || offset + bytes > m.memory.bytes) {
            note(kTooMuchMemory, 0, "more threadgroup memory than the device has");
            suspend(kDone);
        }
        found.offset = offset;
        found.bytes = bytes;
        m.used = u32(offset + bytes);
    }
    return m.memory.begin + found.offset;
}

u32 msl_atomic(void* at, int operation, u32 value, int is_signed) {
    bool write = operation != kAtomicLoad;
    Mode mode = !write ? kRead : operation == kAtomicStore ? kWrite : kUpdate;
    if (m.inside) check(u64(at), 4, mode, true, PC);
    u32 old = *(u32*)at, next = old;
    bool less = is_signed ? i32(value) < i32(old) : value < old;
    switch (operation) {
        case kAtomicStore: case kAtomicExchange: next = value; break;
        case kAtomicAdd: next = old + value; break;
        case kAtomicSub: next = old - value; break;
        case kAtomicMin: next = less ? value : old; break;
        case kAtomicMax: next = less ? old : value; break;
        case kAtomicAnd: next = old & value; break;
        case kAtomicOr: next = old | value; break;
        case kAtomicXor: next = old ^ value; break;
        default: break;
    }
    if (write) *(u32*)at = next;
    return old;
}

void msl_fiber_main() {
    for (;;) {
        Lane& lane = m.lanes[m.current];
        lane.depth = 0;
        lane.path[0] = 0;
        // On the lane's own stack, which it may read.
        MslIds ids = lane.ids;
        void* arguments[kMaxBuffers];
        memcpy(arguments, m.arguments, size_t(m.run->count) * sizeof(void*));
        msl_lane(arguments, &ids);
        suspend(kDone);
    }
}

}  // extern "C"

// --- scheduling ------------------------------------------------------------------------------------------------------

namespace {

const char* where(const Lane& lane) {
    return lane.state == kDone ? "has returned" : lane.state == kBarrier ? "waits at a threadgroup barrier" : "waits at a simdgroup operation";
}

void diverged(u32 one, u32 other) {
    const Lane &a = m.lanes[one], &b = m.lanes[other];
    char text[200];
    snprintf(text, sizeof text, "lane %u %s (line %u) while lane %u %s (line %u)", one, where(a), a.state == kDone ? 0 : a.line,
             other, where(b), b.state == kDone ? 0 : b.line);
    m.current = one;
    note(kDivergence, a.line, text).other = i32(other);
}

// Whether lanes [first, last) stand at the same place; reports divergence where they do not.
bool together(u32 first, u32 last) {
    for (u32 i = first + 1; i < last; i++) {
        const Lane &a = m.lanes[first], &b = m.lanes[i];
        if (a.state == b.state && (a.state == kDone || a.site == b.site)) continue;
        diverged(first, i);
        return false;
    }
    return true;
}

void resolve(u32 first, u32 last) {
    MslTicket* tickets[kWidth];
    u32 simd = first / kWidth;
    if (!m.lanes[first].ticket) {
        for (u32 space : kSpaces)
            if (m.lanes[first].flags & space) m.simd_epoch[space][simd]++;
    } else {
        for (u32 i = first; i < last; i++) tickets[i - first] = m.lanes[i].ticket;
        tickets[0]->resolve(tickets, int(last - first), tickets[0]->argument);
    }
    for (u32 i = first; i < last; i++) m.lanes[i].state = kReady;
}

// Runs one simdgroup until it has ended or waits at a threadgroup barrier.
bool run_simdgroup(u32 first, u32 last) {
    while (m.lanes[first].state == kReady) {
        for (u32 i = 0; i < last - first; i++) {
            resume(m.run->reverse_lanes ? last - 1 - i : first + i);
            if (m.failed) return false;
        }
        if (!together(first, last)) return false;
        if (m.lanes[first].state == kSimd) resolve(first, last);
        if (m.failed) return false;
    }
    return true;
}

bool run_group() {
    u32 simds = (m.lane_count + kWidth - 1) / kWidth;
    for (;;) {
        for (u32 s = 0; s < simds; s++) {
            u32 first = (m.run->reverse_lanes ? simds - 1 - s : s) * kWidth;
            u32 last = first + kWidth < m.lane_count ? first + kWidth : m.lane_count;
            if (!run_simdgroup(first, last)) return false;
        }
        if (!together(0, m.lane_count)) return false;
        if (m.lanes[0].state == kDone) return true;
        for (u32 space : kSpaces)
            if (m.lanes[0].flags & space) m.epoch[space]++;
        for (u32 i = 0; i < m.lane_count; i++) m.lanes[i].state = kReady;
    }
}

void set3(u32* to, u32 x, u32 y, u32 z) { to[0] = x, to[1] = y, to[2] = z; }

// The last threadgroups of a grid that they do not divide are smaller, as with dispatchThreads.
void place_lanes(const u32* at, const u32* size, const u32* groups) {
    MslRun& run = *m.run;
    for (u32 i = 0; i < m.lane_count; i++) {
        MslIds& ids = m.lanes[i].ids;
        u32 x = i % size[0], y = i / size[0] % size[1], z = i / size[0] / size[1];
        set3(ids.thread_position_in_threadgroup, x, y, z);
        set3(ids.threadgroup_position_in_grid, at[0], at[1], at[2]);
        set3(ids.thread_position_in_grid, at[0] * run.threadgroup[0] + x, at[1] * run.threadgroup[1] + y,
             at[2] * run.threadgroup[2] + z);
        set3(ids.threads_per_grid, run.grid[0], run.grid[1], run.grid[2]);
        set3(ids.threads_per_threadgroup, size[0], size[1], size[2]);
        set3(ids.dispatch_threads_per_threadgroup, run.threadgroup[0], run.threadgroup[1], run.threadgroup[2]);
        set3(ids.threadgroups_per_grid, groups[0], groups[1], groups[2]);
        ids.thread_index_in_threadgroup = i;
        ids.thread_index_in_simdgroup = i % kWidth;
        ids.simdgroup_index_in_threadgroup = i / kWidth;
        ids.simdgroups_per_threadgroup = (m.lane_count + kWidth - 1) / kWidth;
        ids.threads_per_simdgroup = kWidth;
        m.lanes[i].state = kReady;
    }
}

bool run_numbered(u32 number, const u32* groups) {
    const MslRun& run = *m.run;
    u32 at[3] = {number % groups[0], number / groups[0] % groups[1], number / groups[0] / groups[1]}, size[3];
    for (int i = 0; i < 3; i++) {
        u32 left = run.grid[i] - at[i] * run.threadgroup[i];
        size[i] = left < run.threadgroup[i] ? left : run.threadgroup[i];
    }
    m.lane_count = size[0] * size[1] * size[2];
    m.group++;
    for (u32 space : kSpaces) m.epoch[space]++;
    m.used = 0;
    memset(m.declarations, 0, sizeof m.declarations);
    m.run->peak_threadgroup_bytes = 0;
    memset(m.memory.begin, 0xff, m.memory.bytes);
    place_lanes(at, size, groups);
    return run_group();
}

void* reserve(u64 bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : at;
}

// Buffers are copied kApart bytes from each other, so that an index that is wrong by less lands in none of them. Inputs
// too large to copy stay where they are.
bool open_regions() {
    m.apart = (u8*)reserve(kApart * (u64(m.run->count) + 1));
    m.regions = (Region*)calloc(size_t(m.run->count) + 1, sizeof(Region));
    if (!m.apart) return false;
    for (i32 i = 0; i < m.run->count; i++) {
        const MslBuffer& buffer = m.run->buffers[i];
        bool copied = buffer.output || buffer.bytes <= kCopied;
        u8* begin = copied ? m.apart + kApart / 2 + u64(i) * kApart : buffer.data;
        if (copied) memcpy(begin, buffer.data, buffer.bytes);
        m.regions[i] = {begin, buffer.bytes, i, bool(buffer.output), bool(buffer.initialised), nullptr, m.run->written[i]};
        if (buffer.output) m.regions[i].cells = (Cell*)calloc(buffer.bytes + 1, sizeof(Cell));
        m.arguments[i] = begin;
    }
    u64 bytes = m.run->threadgroup_bytes + kMaxDeclarations * 2 * kRedZone;
    m.memory = {(u8*)reserve(bytes), bytes, -1, false, false, (Cell*)calloc(bytes, sizeof(Cell)), nullptr};
    return m.memory.begin;
}

void close_regions() {
    for (i32 i = 0; i < m.run->count; i++) {
        if (m.regions[i].output) memcpy(m.run->buffers[i].data, m.regions[i].begin, m.regions[i].bytes);
        free(m.regions[i].cells);
    }
    munmap(m.apart, kApart * (u64(m.run->count) + 1));
    munmap(m.memory.begin, m.memory.bytes);
    free(m.memory.cells), free(m.regions);
}

bool open_lanes(u32 count) {
    m.stacks = (u8*)reserve(u64(count) * kStackBytes);
    m.lanes = (Lane*)reserve(u64(count) * sizeof(Lane));
    if (!m.stacks || !m.lanes) return false;
    m.stack_bytes = u64(count) * kStackBytes;
    for (u32 i = 0; i < count; i++) {
        m.lanes[i].stack = m.stacks + u64(i) * kStackBytes;
        m.lanes[i].stack_pointer = fresh_stack(m.lanes[i].stack + kStackBytes);
    }
    return true;
}

// --- signals: what the instrumentation does not see, such as writes to constants and division by zero -------------------

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
sigjmp_buf m_escape;

void on_signal(int number, siginfo_t* info, void*) {
    if (!m.inside) {  // not the kernel's: let it end the process
        signal(number, SIG_DFL);
        return;
    }
    m.inside = false;
    bool constant = number == SIGSEGV && module_of(info->si_addr) == m.module;
    Region* region = nearest(u64(info->si_addr));
    Kind kind = constant ? kInputWrite : number == SIGSEGV || number == SIGBUS ? kOutOfBounds : kUndefined;
    MslReport& report = note(kind, 0, constant ? "writes to a program-scope constant" : "stopped by a signal");
    if (region) report.buffer = region->index, report.offset = i64(u64(info->si_addr) - u64(region->begin));
    siglongjmp(m_escape, 1);
}

void catch_signals(struct sigaction* before) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; i++) sigaction(kSignals[i], &action, &before[i]);
}

void restore_signals(const struct sigaction* before) {
    for (int i = 0; i < 4; i++) sigaction(kSignals[i], &before[i], nullptr);
}

void run_all(const u32* groups) {
    struct sigaction before[4];
    catch_signals(before);
    if (!sigsetjmp(m_escape, 1))
        for (u64 i = 0; i < m.run->groups && !m.failed; i++) run_numbered(m.run->order[i], groups);
    restore_signals(before);
}

}  // namespace

// 0: ended; 1: run->report says what was found; -1: no memory for the lanes.
extern "C" __attribute__((visibility("default"))) int msl_run(MslRun* run) {
    memset(&m, 0, sizeof m);
    m.run = run;
    u32 count = run->threadgroup[0] * run->threadgroup[1] * run->threadgroup[2];
    if (!open_lanes(count)) return -1;
    m.module = module_of((void*)&msl_lane);
    if (!open_regions()) return -1;
    u32 groups[3];
    for (int i = 0; i < 3; i++) groups[i] = (run->grid[i] + run->threadgroup[i] - 1) / run->threadgroup[i];
    run_all(groups);
    close_regions();
    munmap(m.stacks, u64(count) * kStackBytes);
    munmap(m.lanes, u64(count) * sizeof(Lane));
    return m.failed;
}
