// One run of a kernel, from the call of the Python side to its report; signals on the way are faults of the kernel.
//
// They are what the instrumentation does not see, such as writes to constants and division by zero.
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#include "machine.h"

using namespace msl;

namespace msl {
Machine m;
}

namespace {

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
