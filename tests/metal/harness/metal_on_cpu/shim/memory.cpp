// What a kernel may touch: every access is checked here before it happens, for bounds, writes to inputs, reads of what
// nobody wrote, and races. The instrumentation's hooks are here too, so that the check is inlined into them.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "machine.h"

using namespace msl;

// --- reports ---------------------------------------------------------------------------------------------------------

namespace msl {

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
             u32 line) {
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

}  // namespace msl

// --- what the instrumented kernel calls ------------------------------------------------------------------------------

extern "C" {

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

}  // extern "C"
