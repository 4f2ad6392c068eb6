// On which processors threads run. Two compute threads on one processor take twice as long, and while read threads wake all
// the time on another, the system's balancing seldom finds that one idle for long enough to move either.
#pragma once

#include <thread>
#include <vector>

namespace fs {

int processor();  // that the calling thread runs on; -1 where the system does not say

// Lets a thread run wherever the caller may, but on none of these processors. Changes nothing where that leaves it no other.
void keep_off(std::thread& thread, const std::vector<int>& processors);

}  // namespace fs
