// Threads and processors on Linux; elsewhere the system decides alone.
#include "apart.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>

int fs::processor() { return sched_getcpu(); }

void fs::keep_off(std::thread& thread, const std::vector<int>& processors) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;  // a machine with more processors than the set holds
    for (int each : processors)
        if (each >= 0 && each < CPU_SETSIZE) CPU_CLR(each, &allowed);
    if (CPU_COUNT(&allowed)) pthread_setaffinity_np(thread.native_handle(), sizeof allowed, &allowed);
}
#else
int fs::processor() { return -1; }
void fs::keep_off(std::thread&, const std::vector<int>&) {}
#endif
