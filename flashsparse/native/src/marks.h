// From marks to numbers: which neurons some token has marked. Leaves out how they are marked (select.cpp, compact.cpp) and
// computed (activations, whose marks are the values that are not zero).
#pragma once

#include <stdint.h>

namespace fs {

// marks[tokens, n], zero or not; ids (room for n): the ascending numbers that some token marks. Returns how many.
template <class Mark>
int64_t numbers_of_any(const Mark* marks, int64_t tokens, int64_t n, int32_t* ids) {
    for (int64_t i = 0; i < n; i++) ids[i] = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i++) ids[i] |= marks[t * n + i] != 0;
    int64_t count = 0;  // the marks become numbers in place: count never passes i
    for (int64_t i = 0; i < n; i++) {
        int32_t any = ids[i];
        ids[count] = int32_t(i);
        count += any;
    }
    return count;
}

}  // namespace fs
