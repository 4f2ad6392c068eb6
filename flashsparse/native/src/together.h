// Several requests with one system call: Linux's asynchronous reads (io_submit). Knows descriptors, offsets and addresses.
// A virtual drive is told of all of them at once, which is what most of a read's processor time goes to. For direct reads
// only: others block the caller one after the other.
#pragma once

#include <stdint.h>

#include <vector>

class Together {
  public:
    struct Request {
        int32_t fd;
        int64_t offset, length;
        void* dest;
        int32_t tag;  // the caller's
    };
    struct Event {
        int32_t tag;
        int64_t got;  // bytes; negative: it failed
    };

    static constexpr int kMost = 8;  // requests at a time

    // `ready` is false where the system has no such interface, or none left to give.
    Together();
    ~Together();
    Together(Together&&) noexcept;
    Together(const Together&) = delete;
    Together& operator=(const Together&) = delete;

    bool ready() const { return context_ != 0; }

    // How many of the requests, from the first on, have begun. The others have not, and will not.
    int64_t begin(const std::vector<Request>& requests);

    // Waits for `least` of those that have begun; adds what has ended to `events`.
    void await(int64_t least, std::vector<Event>& events);

    static bool direct(int32_t fd);  // whether reads of it bypass the page cache

  private:
    uintptr_t context_ = 0;
};
