// Memory of a run: buffers far from each other, threadgroup memory, the lanes' stacks.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "machine.h"

namespace msl {

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

}  // namespace msl
