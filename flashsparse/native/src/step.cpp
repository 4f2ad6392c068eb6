// One token's step, layer after layer. Composed of attention, the choices' kernels and the rounds through their C interface:
// what this adds is their order, and that no caller runs in between.
#include "step.h"

#include <algorithm>

#include "requests.h"

namespace {

using fs::clock_ns;

// The neurons that x [d] needs, ascending; returns how many.
int64_t choose(fs_workers* workers, const fs_choice& of, const float* x, int64_t records, int32_t* ids) {
    switch (of.kind) {
        case FS_ACTIVE:
            fs_linear(workers, of.scoring, of.bias, x, 1, of.values);
            fs_activate(of.values, records, of.activation, of.param);
            return fs_active(of.values, 1, records, ids);
        case FS_SCORED:
            fs_score(workers, of.scoring, of.bias, x, 1, of.values);
            if (of.k) return fs_select_topk(of.values, 1, records, of.k, of.threshold, of.mask, ids);
            return fs_select(of.values, 1, records, of.threshold, of.mask, ids);
        default:
            return fs_candidates(workers, of.compact, x, 1, of.activation, of.param, of.mask, ids, nullptr);
    }
}

// The layer's FFN of x, into y.
int32_t feed_forward(fs_rounds* rounds, fs_workers* workers, const fs_step& step, fs_step_layer& layer, const float* x,
                     fs_tally* tally) {
    const int64_t d = step.record->d, records = layer.home->slots->records;
    layer.chosen = choose(workers, *layer.choice, x, records, layer.ids);
    const float* activated = layer.choice->kind == FS_ACTIVE ? layer.choice->values : nullptr;
    const fs_ffn_input input{step.record, x, 1, records, activated, nullptr, step.hidden, step.width, step.y, step.count_fired};
    std::fill(step.y, step.y + d, 0.0f);
    const fs_hint* next = step.hints && step.at + 1 < step.end ? step.layers[step.at + 1].hint : nullptr;
    const int32_t status = fs_rounds_run(rounds, layer.home, layer.ids, layer.chosen, &input, next, tally);
    if (!status && layer.down_bias)
        for (int64_t i = 0; i < d; i++) step.y[i] += layer.down_bias[i];
    return status;
}

void add(fs_workers* workers, const fs_step& step, const fs_step_layer& layer) {
    const int64_t d = step.record->d;
    if (step.residual != 1.0f)
        for (int64_t i = 0; i < d; i++) step.y[i] *= step.residual;
    for (int64_t i = 0; i < d; i++) step.h[i] += step.y[i];
    if (layer.closing.weight) fs_normalize(workers, &layer.closing, step.h, 1, d, step.h);
}

}  // namespace

extern "C" int32_t fs_step_run(fs_rounds* rounds, fs_workers* workers, fs_step* step, int64_t patience, fs_tally* tally) {
    const int64_t began = clock_ns();
    for (int64_t now = began; step->at < step->end && now - began < patience; step->at++) {
        fs_step_layer& layer = step->layers[step->at];
        fs_attend(workers, layer.attention, layer.keys, layer.values, step->capacity, step->offset, step->turns, 1, step->h,
                  step->x, step->scratch);
        const int64_t attended = clock_ns();
        fs_tally counted = *tally;
        const int32_t status =
            feed_forward(rounds, workers, *step, layer, step->after_residual ? step->h : step->x, &counted);
        step->attention_ns += attended - now;
        if (status) {
            // As if the failed layer had not been counted.
            tally->offset = counted.offset, tally->need = counted.need, tally->got = counted.got, tally->error = counted.error;
            return status;
        }
        now = clock_ns();
        step->ffn_ns += now - attended - (counted.hint_ns - tally->hint_ns);
        *tally = counted;
        add(workers, *step, layer);
    }
    return FS_DONE;
}
