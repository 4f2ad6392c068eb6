// Seconds inside the library's compute functions, per calling thread: what is neither reading nor bookkeeping.
#pragma once

#include <chrono>
#include <cstdint>

namespace fs {

extern thread_local int64_t compute_ns;
extern thread_local int compute_depth;

// Counts its scope's time to the calling thread; scopes inside another count once.
class Timed {
  public:
    Timed() {
        if (compute_depth++ == 0) began_ = now();
    }
    ~Timed() {
        if (--compute_depth == 0) compute_ns += now() - began_;
    }
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

  private:
    static int64_t now() {
        using namespace std::chrono;
        return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
    }
    int64_t began_ = 0;
};

}  // namespace fs
