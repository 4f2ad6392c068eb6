// The activation functions on one value. Inputs of NaN give NaN, so that a broken model does not look like a sparse one.
#pragma once

#include <math.h>

#include "flashsparse.h"

namespace {

inline float relu(float v) { return v > 0.0f || v != v ? v : 0.0f; }

inline float activate(float v, int32_t activation, float param) {
    switch (activation) {
        case FS_SILU: return v / (1.0f + expf(-v));
        case FS_RELU2: return relu(v) * relu(v);
        case FS_FATRELU: return v >= param || v != v ? v : 0.0f;
        default: return relu(v);
    }
}

}  // namespace
