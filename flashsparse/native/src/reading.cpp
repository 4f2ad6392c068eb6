// Positioned reads of records, alone or several with one request. Knows descriptors, offsets and addresses.
#include "reading.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr int64_t kMostBytes = 1 << 30;  // macOS refuses reads of 2 GiB and more
constexpr int64_t kAlignment = 4096;

bool at_end(int fd, int64_t position) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && position >= status.st_size;
}

// A direct read cannot continue at an unaligned place (EINVAL): it steps back to an aligned one, once for each place,
// and otherwise finds that the file has ended.
Outcome read_fully(const fs_read& r) {
    int64_t got = 0, retried = 0;
    auto* dest = static_cast<uint8_t*>(r.dest);
    while (got < r.need) {
        int64_t ask = r.length - got < kMostBytes ? r.length - got : kMostBytes;
        ssize_t count = pread(r.fd, dest + got, size_t(ask), off_t(r.offset + got));
        if (count > 0) {
            got += count;
        } else if (count == 0) {
            return {got, 0};
        } else if (errno == EINVAL && got % kAlignment != 0 && got > retried) {
            retried = got;
            got -= got % kAlignment;
        } else if (errno != EINTR) {
            int error = errno;
            return {got, got > 0 && error == EINVAL && at_end(r.fd, r.offset + got) ? 0 : error};
        }
    }
    return {got, 0};
}

}  // namespace

int64_t read_run(const fs_read* reads, int64_t n, uint8_t* staging, int64_t bytes, Outcome* outcomes) {
    const fs_read& last = reads[n - 1];
    const int64_t begin = reads[0].offset, length = last.offset + last.length - begin;
    int64_t arrived = 0;
    if (n > 1 && length <= bytes) {
        Outcome all = read_fully({begin, length, last.offset + last.need - begin, staging, reads[0].fd, 0});
        arrived = all.got;
        // Also when it failed: each record of it that is there counts.
        for (int64_t i = 0; i < n; i++) {
            const fs_read& read = reads[i];
            int64_t got = std::max<int64_t>(0, std::min(read.length, all.got - (read.offset - begin)));
            memcpy(read.dest, staging + (read.offset - begin), size_t(got));
            outcomes[i] = {got, all.error};
        }
        return arrived;
    }
    for (int64_t i = 0; i < n; i++) {
        outcomes[i] = read_fully(reads[i]);
        arrived += outcomes[i].got;
    }
    return arrived;
}
