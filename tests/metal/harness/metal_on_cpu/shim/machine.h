// The runtime's own state, shared by its files: one run at a time in a module, so there is one Machine.
//
// runtime.h is what kernels see; fibers.cpp switches between lanes, memory.cpp checks accesses, collectives.cpp is what a
// kernel calls, schedule.cpp runs threadgroups, buffers.cpp holds their memory, run.cpp is the entry and catches signals.
#pragma once

#include "runtime.h"

#define PC u64(__builtin_return_address(0))  // where the kernel stands

namespace msl {

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
};

extern __attribute__((visibility("hidden"))) Machine m;  // the attribute: not through a table of addresses

// Who keeps what: fibers.cpp
void* fresh_stack(u8* top);
void suspend(State state);   // of the lane that runs
void resume(u32 index);

// memory.cpp: reports, and the checks of every access
MslReport& note(Kind kind, u32 line, const char* text);
void stop_at(Kind kind, const Region* region, u64 address, u32 bytes, bool write, i32 other, u64 pc, const char* text,
             u32 line = 0);  // called inside a lane; never returns to it
Region* find(u64 address);
Region* nearest(u64 address);
u8* module_of(const void* at);
void check(u64 address, u32 bytes, Mode mode, bool atomic, u64 pc);

// buffers.cpp
void* reserve(u64 bytes);
bool open_regions();
void close_regions();
bool open_lanes(u32 count);

// schedule.cpp
bool run_numbered(u32 number, const u32* groups);

}  // namespace msl
