// The read plan: which neighbouring records one request reads, gaps between them included.
#include "reading.h"

extern "C" int64_t fs_plan_reads(const fs_read* reads, int64_t n, int64_t gap, int64_t longest, int32_t* firsts,
                                 int64_t* bytes) {
    int64_t runs = 0, begin = 0, end = 0;
    *bytes = 0;
    for (int64_t i = 0; i < n; i++) {
        const fs_read& read = reads[i];
        int64_t after = read.offset + read.length;
        bool joins = i > 0 && gap >= 0 && read.fd == reads[i - 1].fd && read.offset - end <= gap &&
                     after - begin <= longest && i - firsts[runs - 1] < kMostRecords;
        if (!joins) {
            firsts[runs++] = int32_t(i);
            begin = end = read.offset;
        }
        *bytes += after - end;
        end = after;
    }
    firsts[runs] = int32_t(n);
    return runs;
}
