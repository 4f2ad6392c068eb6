// One request to the operating system, for one record or for neighbours.
#pragma once

#include <algorithm>

#include "flashsparse.h"

constexpr int32_t kMostRecords = 256;  // of one request

struct Outcome {
    int64_t got;
    int32_t error;  // errno; 0 with got < need: the file ended
};

// Reads n records, ascending in one file, each to its place; of several, one request brings all to `staging` first, if
// they fit its `bytes`. Handing the places themselves to one request (preadv) is slower on drives that pay for each
// piece of memory. outcomes[n]; returns the bytes that arrived, gaps included.
int64_t read_run(const fs_read* reads, int64_t n, uint8_t* staging, int64_t bytes, Outcome* outcomes);

// The same as one request for whoever reads elsewhere. Of a run that has to be read one by one `length` is 0.
struct RunPlace {
    int64_t offset, length;
    void* dest;
};
RunPlace run_place(const fs_read* reads, int64_t n, uint8_t* staging, int64_t bytes);

// `got` bytes of it have arrived: puts records into their places, and is true where none is missing.
bool end_run(const fs_read* reads, int64_t n, const uint8_t* staging, int64_t bytes, int64_t got, Outcome* outcomes);
