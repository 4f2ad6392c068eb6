// The calls themselves, without a library: their numbers and structures are the kernel's interface.
#include "together.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

#include <utility>

#if defined(__linux__) && __has_include(<linux/aio_abi.h>)
#define FS_TOGETHER 1
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

Together::Together(Together&& other) noexcept : context_(std::exchange(other.context_, 0)) {}

#if defined(FS_TOGETHER)

Together::Together() {
    aio_context_t made = 0;
    if (syscall(SYS_io_setup, unsigned(kMost), &made) == 0) context_ = uintptr_t(made);
}

Together::~Together() {
    if (context_) syscall(SYS_io_destroy, aio_context_t(context_));
}

int64_t Together::begin(const std::vector<Request>& requests) {
    iocb blocks[kMost] = {}, *list[kMost];
    const int64_t count = int64_t(requests.size());
    for (int64_t i = 0; i < count; i++) {
        const Request& r = requests[size_t(i)];
        iocb& block = blocks[i];
        block.aio_data = uint64_t(r.tag);
        block.aio_lio_opcode = IOCB_CMD_PREAD;
        block.aio_fildes = uint32_t(r.fd);
        block.aio_buf = uint64_t(reinterpret_cast<uintptr_t>(r.dest));
        block.aio_nbytes = uint64_t(r.length), block.aio_offset = r.offset;
        list[i] = &block;
    }
    int64_t begun = 0;
    while (begun < count) {
        long more = syscall(SYS_io_submit, aio_context_t(context_), long(count - begun), list + begun);
        if (more > 0) begun += more;
        else if (more == 0 || errno != EINTR) break;
    }
    return begun;
}

void Together::await(int64_t least, std::vector<Event>& events) {
    io_event ended[kMost];
    long count;
    do count = syscall(SYS_io_getevents, aio_context_t(context_), long(least), long(kMost), ended, nullptr);
    while (count < 0 && errno == EINTR);
    if (count < 0) abort();  // the kernel writes into memory of ours, and does not say until when
    for (long i = 0; i < count; i++) events.push_back({int32_t(ended[i].data), int64_t(ended[i].res)});
}

bool Together::direct(int32_t fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_DIRECT);
}

#else

Together::Together() = default;
Together::~Together() = default;
int64_t Together::begin(const std::vector<Request>&) { return 0; }
void Together::await(int64_t, std::vector<Event>&) { abort(); }  // nothing has begun
bool Together::direct(int32_t) { return false; }

#endif
