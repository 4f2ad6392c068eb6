// The order of lanes, simdgroups and threadgroups: lanes run until they wait, and go on when all that must meet have come to
// the same place; otherwise they have diverged.
#include <stdio.h>
#include <string.h>

#include "machine.h"

namespace msl {

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

}  // namespace

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

}  // namespace msl
