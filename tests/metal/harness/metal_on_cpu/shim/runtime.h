// What a translated kernel and the runtime share: lane numbers, collectives, and what the Python side passes and reads.
// Included by metal_stdlib.h (compiled with each kernel) and by the runtime's files (compiled once); no other header is needed.
#pragma once

typedef __UINT8_TYPE__ u8;
typedef __INT32_TYPE__ i32;
typedef __UINT32_TYPE__ u32;
typedef __INT64_TYPE__ i64;
typedef __UINT64_TYPE__ u64;

struct MslIds {
    u32 thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
    u32 threads_per_grid[3], threads_per_threadgroup[3], threadgroups_per_grid[3];
    u32 thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    u32 simdgroups_per_threadgroup, threads_per_simdgroup;
    u32 dispatch_threads_per_threadgroup[3];
};

// One lane's part in a collective of its simdgroup. `resolve` fills every ticket's `out` from all tickets' `in`.
struct MslTicket {
    const void* in;
    void* out;
    u32 lane;
    void (*resolve)(MslTicket* const* tickets, int count, u32 argument);
    u32 argument;
};

enum { kMemNone = 0, kMemDevice = 1, kMemThreadgroup = 2 };
enum { kAtomicLoad, kAtomicStore, kAtomicAdd, kAtomicSub, kAtomicMin, kAtomicMax, kAtomicAnd, kAtomicOr, kAtomicXor,
       kAtomicExchange };

struct MslBuffer {
    u8* data;
    u64 bytes;
    i32 output, initialised;
};

struct MslReport {
    i32 kind, buffer;  // buffer: its index, -1 threadgroup memory, -2 unknown
    i64 offset;        // bytes from the buffer's start
    i32 bytes, write, lane, other, line, group[3];
    u64 pc;            // within the module; 0: none
    char text[200];
};

struct MslRun {
    const MslBuffer* buffers;
    i32 count;
    u32 grid[3], threadgroup[3];
    const u32* order;    // the threadgroups' linear numbers in the order they run
    u64 groups;
    i32 reverse_lanes;   // run simdgroups and lanes from the last to the first
    u32 threadgroup_bytes;
    u8* const* written;  // per buffer, one byte per byte; null for inputs
    MslReport report;
    u64 accesses, collectives, peak_threadgroup_bytes;
};

extern "C" {
void msl_lane(void* const* buffers, const MslIds* ids);  // the kernel's entry, in the translated source
void msl_collective(MslTicket* ticket, u32 line);
void msl_threadgroup_barrier(u32 flags, u32 line);
void msl_simdgroup_barrier(u32 flags, u32 line);
void* msl_threadgroup_memory(u32 declaration, u64 bytes, u64 alignment);
void msl_missing_lane(u32 lane);
u32 msl_atomic(void* at, int operation, u32 value, int is_signed);
}
