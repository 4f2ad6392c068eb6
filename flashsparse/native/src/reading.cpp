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

int64_t run_length(const fs_read* reads, int64_t n) { return reads[n - 1].offset + reads[n - 1].length - reads[0].offset; }
int64_t run_need(const fs_read* reads, int64_t n) { return reads[n - 1].offset + reads[n - 1].need - reads[0].offset; }

// Also when it failed: each record of it that is there counts.
void share_out(const fs_read* reads, int64_t n, const uint8_t* staging, Outcome all, Outcome* outcomes) {
    for (int64_t i = 0; i < n; i++) {
        const fs_read& read = reads[i];
        const int64_t before = read.offset - reads[0].offset;
        int64_t got = std::max<int64_t>(0, std::min(read.length, all.got - before));
        memcpy(read.dest, staging + before, size_t(got));
        outcomes[i] = {got, all.error};
    }
}

}  // namespace

RunPlace run_place(const fs_read* reads, int64_t n, uint8_t* staging, int64_t bytes) {
    const int64_t length = run_length(reads, n);
    const bool one = n == 1 ? length <= kMostBytes : length <= bytes;
    return {reads[0].offset, one ? length : 0, n == 1 ? reads[0].dest : staging};
}

bool end_run(const fs_read* reads, int64_t n, const uint8_t* staging, int64_t bytes, int64_t got, Outcome* outcomes) {
    if (got < run_need(reads, n) || (n > 1 && run_length(reads, n) > bytes)) return false;
    if (n > 1) share_out(reads, n, staging, {got, 0}, outcomes);
    else outcomes[0] = {got, 0};
    return true;
}

int64_t read_run(const fs_read* reads, int64_t n, uint8_t* staging, int64_t bytes, Outcome* outcomes) {
    int64_t arrived = 0;
    if (n > 1 && run_length(reads, n) <= bytes) {
        Outcome all = read_fully({reads[0].offset, run_length(reads, n), run_need(reads, n), staging, reads[0].fd, 0});
        share_out(reads, n, staging, all, outcomes);
        return all.got;
    }
    for (int64_t i = 0; i < n; i++) {
        outcomes[i] = read_fully(reads[i]);
        arrived += outcomes[i].got;
    }
    return arrived;
}
