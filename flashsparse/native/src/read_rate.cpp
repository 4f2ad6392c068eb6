// What the drive gives to a bare loop of positioned reads: the ceiling that the read pool is held against.
#include <errno.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#include "flashsparse.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Loop {
    int fd;
    const int64_t* offsets;
    int64_t n, length;
    Clock::time_point end;
    std::atomic<int64_t> next{0}, finished{0};
    std::atomic<int32_t> error{0};

    void run(uint8_t* dest) {
        int64_t mine = 0;
        for (int64_t i; (i = next++) < n && error == 0 && (mine++ == 0 || Clock::now() < end);) {
            ssize_t count = pread(fd, dest, size_t(length), off_t(offsets[i]));
            if (count == length) finished++;
            else if (count >= 0 || errno != EINTR) error = count < 0 ? errno : EIO;
        }
    }
};

}  // namespace

extern "C" int64_t fs_read_rate(int32_t fd, const int64_t* offsets, int64_t n, int64_t length, int32_t threads,
                                int64_t nanoseconds, uint8_t* memory, int64_t out[2]) {
    auto begin = Clock::now();
    Loop loop{fd, offsets, n, length, begin + std::chrono::nanoseconds(nanoseconds)};
    std::vector<std::thread> running;
    try {
        for (int i = 0; i < threads; i++) running.emplace_back([&loop, memory, i] { loop.run(memory + i * loop.length); });
    } catch (const std::system_error&) {
        loop.error = EAGAIN;
    }
    for (auto& thread : running) thread.join();
    out[0] = loop.finished;
    out[1] = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
    return -loop.error;
}
