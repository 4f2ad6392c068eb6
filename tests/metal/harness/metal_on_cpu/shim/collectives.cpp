// What a kernel calls by name, and the undefined-behaviour sanitizer's hooks: collectives, barriers, threadgroup memory,
// atomics. A lane that must wait for others is suspended; schedule.cpp lets them meet.
#include <string.h>

#include "machine.h"

using namespace msl;

extern "C" {

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
