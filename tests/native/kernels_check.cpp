// Every kernel of the C interface against float64 references: odd sizes, empty sets, NaN and Inf, and the promise that a
// value's bits do not depend on tokens or threads. A program of its own, so that it runs where there is no Python:
// `make test-arm` cross-compiles it with the library and runs it under qemu. Exit status 0: all passed.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "flashsparse.h"

namespace {

int failures = 0, checks = 0;
uint64_t seed = 1;

double uniform() {  // -1..1
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(seed) >> 11) / double(int64_t(1) << 52);
}

void check(bool good, const std::string& what) {
    checks++;
    if (good) return;
    failures++;
    printf("FAILED: %s\n", what.c_str());
}

void check_close(double found, double expected, double magnitude, const std::string& what) {
    bool good = std::fabs(found - expected) <= 1e-6 * magnitude + 1e-30;
    check(good, good ? "" : what + ": found " + std::to_string(found) + ", expected " + std::to_string(expected));
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

std::vector<float> normal(int64_t n) {
    std::vector<float> out(static_cast<size_t>(n));
    for (auto& value : out) value = float(uniform() + uniform() + uniform());
    return out;
}

double half(uint16_t h, bool bf16) {
    int exponent = bf16 ? h >> 7 & 255 : h >> 10 & 31, bits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
    double fraction = double(h & ((1 << bits) - 1)) / (1 << bits);
    double value = exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias);
    return h & 0x8000 ? -value : value;
}

uint16_t random_half(bool bf16) {  // finite, of moderate size
    uint16_t exponent = uint16_t((bf16 ? 124 : 12) + int(2 * uniform()));
    uint16_t bits = uint16_t(int64_t(uniform() * 1e6) & (bf16 ? 127 : 1023));
    return uint16_t(bits | exponent << (bf16 ? 7 : 10) | (uniform() < 0 ? 0x8000 : 0));
}

const char* names[] = {"F32", "F16", "BF16", "Q8", "Q4", "Q1", "Q2", "Q3"};
const int widths[] = {32, 16, 16, 8, 4, 1, 2, 3};

// A stored vector set with its exact values; bytes(): one vector as a record's field.
struct Stored {
    int64_t rows, cols;
    int32_t dtype, scale_dtype, group;
    std::vector<uint8_t> data, scales, biases;
    std::vector<double> values;

    fs_matrix matrix() const { return {data.data(), scales.data(), biases.data(), rows, cols, dtype, scale_dtype, group, 0}; }

    void append(int64_t row, std::vector<uint8_t>& out) const {
        for (const auto* part : {&data, &scales, &biases}) {
            int64_t size = int64_t(part->size()) / rows;
            out.insert(out.end(), part->begin() + row * size, part->begin() + (row + 1) * size);
        }
    }
};

double put_float(std::vector<uint8_t>& out, int32_t dtype) {
    if (dtype == FS_F32) {
        float value = float(uniform());
        out.insert(out.end(), (uint8_t*)&value, (uint8_t*)&value + 4);
        return value;
    }
    uint16_t value = random_half(dtype == FS_BF16);
    out.insert(out.end(), (uint8_t*)&value, (uint8_t*)&value + 2);
    return half(value, dtype == FS_BF16);
}

Stored stored(int64_t rows, int64_t cols, int32_t dtype, int32_t group = 0, int32_t scale_dtype = FS_F16) {
    Stored s{rows, cols, dtype, group ? scale_dtype : dtype, group, {}, {}, {}, {}};
    if (!group) {
        for (int64_t i = 0; i < rows * cols; i++) s.values.push_back(put_float(s.data, dtype));
        return s;
    }
    int bits = widths[dtype];
    std::vector<int> numbers;
    s.data.assign(size_t(rows * cols * bits / 8), 0);
    for (int64_t i = 0; i < rows * cols; i++) {
        int number = int((uniform() + 1) * 1000) % (1 << bits);
        numbers.push_back(number);
        for (int b = 0; b < bits; b++)
            if (number >> b & 1) s.data[size_t((i * bits + b) / 8)] |= uint8_t(1 << (i * bits + b) % 8);
    }
    for (int64_t g = 0; g < rows * cols / group; g++) {
        double scale = put_float(s.scales, scale_dtype), bias = put_float(s.biases, scale_dtype);
        for (int i = 0; i < group; i++) s.values.push_back(numbers[size_t(g * group + i)] * scale + bias);
    }
    return s;
}

struct Kind {
    int32_t dtype, group, scale_dtype;
};
const Kind kinds[] = {{FS_F32, 0, 0}, {FS_F16, 0, 0}, {FS_BF16, 0, 0}, {FS_Q8, 64, FS_F16}, {FS_Q8, 128, FS_BF16},
                      {FS_Q8, 32, FS_F32}, {FS_Q4, 64, FS_F16}, {FS_Q4, 128, FS_F32}, {FS_Q4, 32, FS_BF16}};

std::vector<float> linear(fs_workers* workers, const Stored& w, const std::vector<float>& bias, const float* x, int64_t tokens) {
    std::vector<float> y(size_t(tokens * w.rows), NAN);
    fs_matrix m = w.matrix();
    fs_linear(workers, &m, bias.empty() ? nullptr : bias.data(), x, tokens, y.data());
    return y;
}

void check_linear(fs_workers* one, fs_workers* two) {
    for (const Kind& kind : kinds)
        for (int64_t cols : {1, 7, 8, 17, 100, 128, 384, 640, 1152})
            for (int64_t tokens : {1, 5, 70}) {
                if (kind.group && cols % kind.group) continue;
                std::string what = std::string("linear ") + names[kind.dtype] + " " + std::to_string(cols) + " x " + std::to_string(tokens);
                Stored w = stored(53, cols, kind.dtype, kind.group, kind.scale_dtype);
                std::vector<float> x = normal(tokens * cols), bias = normal(53), y = linear(two, w, bias, x.data(), tokens);
                for (int64_t t = 0; t < tokens; t++)
                    for (int64_t r = 0; r < 53; r++) {
                        double sum = bias[size_t(r)], magnitude = std::fabs(sum);
                        for (int64_t k = 0; k < cols; k++) {
                            double term = w.values[size_t(r * cols + k)] * x[size_t(t * cols + k)];
                            sum += term, magnitude += std::fabs(term);
                        }
                        // Of a quantized vector, number * scale and bias are rounded apart.
                        check_close(y[size_t(t * 53 + r)], sum, kind.group ? 8 * magnitude + 10 : magnitude, what);
                    }
                check(same(y, linear(one, w, bias, x.data(), tokens)), what + ": threads change bits");
                std::vector<float> last = linear(two, w, bias, x.data() + (tokens - 1) * cols, 1);
                check(memcmp(last.data(), y.data() + (tokens - 1) * 53, 53 * 4) == 0, what + ": tokens change bits");
            }
}

void check_not_finite(fs_workers* two) {
    for (const Kind& kind : kinds)
        for (float bad : {NAN, INFINITY}) {
            Stored w = stored(5, 256, kind.dtype, kind.group, kind.scale_dtype);
            std::vector<float> x = normal(3 * 256);
            x[256 + 77] = bad;
            std::vector<float> y = linear(two, w, {}, x.data(), 3);
            for (int r = 0; r < 5; r++) {
                check(std::isfinite(y[size_t(r)]) && std::isfinite(y[size_t(10 + r)]), "NaN or Inf spreads to other tokens");
                check(!std::isfinite(y[size_t(5 + r)]), "NaN or Inf is hidden in a product");
            }
        }
}

void check_score(fs_workers* two) {
    for (int32_t dtype : {FS_Q1, FS_Q2, FS_Q3, FS_Q4})
        for (int32_t group : {32, 64, 128})
            for (int64_t cols : {128, 384, 1152}) {
                Stored w = stored(13, cols, dtype, group);
                fs_matrix m = w.matrix();
                std::vector<float> x = normal(2 * cols), y(26);
                x[size_t(cols + 3)] = NAN;
                fs_score(two, &m, nullptr, x.data(), 2, y.data());
                for (int64_t r = 0; r < 13; r++) {
                    double sum = 0, magnitude = 0;
                    for (int64_t first = 0; first < cols; first += group) {
                        double top = 0;
                        for (int i = 0; i < group; i++) top = std::fmax(top, std::fabs(x[size_t(first + i)]));
                        for (int i = 0; i < group; i++) {
                            double step = top / 127, value = step * std::nearbyint(x[size_t(first + i)] / step);
                            double term = w.values[size_t(r * cols + first + i)] * value;
                            sum += term, magnitude += std::fabs(term);
                        }
                    }
                    check_close(y[size_t(r)], sum, 20 * magnitude + 20, std::string("score ") + names[dtype]);
                    check(std::isnan(y[size_t(13 + r)]), "NaN is hidden in a score");
                }
            }
}

void check_gather() {
    for (const Kind& kind : kinds) {
        Stored w = stored(6, 128, kind.dtype, kind.group, kind.scale_dtype);
        fs_matrix m = w.matrix();
        int32_t ids[] = {5, 0, 5};
        std::vector<float> out(3 * 128);
        fs_gather(&m, ids, 3, out.data());
        for (int j = 0; j < 3; j++)
            for (int k = 0; k < 128; k++) {
                double value = w.values[size_t(ids[j] * 128 + k)];
                check_close(out[size_t(j * 128 + k)], value, std::fabs(value) + 10, std::string("gather ") + names[kind.dtype]);
            }
    }
}

void check_attention(fs_workers* one, fs_workers* two) {
    for (int32_t dtype : {FS_F32, FS_F16, FS_BF16})
        for (int64_t hd : {8, 20, 64})
            for (int64_t heads : {2, 6})
                for (int64_t window : {0, 5}) {
                    const int64_t kv = 2, tokens = 3, offset = 19, capacity = 30;
                    int64_t size = dtype == FS_F32 ? 4 : 2, seen = offset + tokens;
                    std::vector<uint8_t> k(size_t(kv * capacity * hd * size)), v = k;
                    std::vector<float> new_k = normal(seen * kv * hd), new_v = normal(seen * kv * hd);
                    fs_kv_append(new_k.data(), k.data(), dtype, seen, kv, hd, capacity, 0);
                    fs_kv_append(new_v.data(), v.data(), dtype, seen, kv, hd, capacity, 0);
                    auto at = [&](const std::vector<uint8_t>& cache, int64_t h, int64_t position, int64_t i) -> double {
                        const uint8_t* p = cache.data() + ((h * capacity + position) * hd + i) * size;
                        if (dtype == FS_F32) return *(const float*)p;
                        return half(*(const uint16_t*)p, dtype == FS_BF16);
                    };
                    check(std::fabs(at(k, 1, 7, 3) - new_k[size_t((7 * kv + 1) * hd + 3)]) <= 0.01, "kv_append rounds");
                    std::vector<float> q = normal(tokens * heads * hd), out(q.size()), again(q.size()), last(size_t(heads * hd));
                    auto attend = [&](fs_workers* workers, const float* from, int64_t count, int64_t start, float* to) {
                        fs_attention(workers, from, k.data(), v.data(), dtype, count, heads, kv, hd, capacity, start, window, 0.3f, to);
                    };
                    attend(two, q.data(), tokens, offset, out.data());
                    attend(one, q.data(), tokens, offset, again.data());
                    check(same(out, again), "attention: threads change bits");
                    attend(two, q.data() + (tokens - 1) * heads * hd, 1, offset + tokens - 1, last.data());
                    check(memcmp(last.data(), out.data() + (tokens - 1) * heads * hd, last.size() * 4) == 0, "attention: tokens change bits");
                    for (int64_t t = 0; t < tokens; t++)
                        for (int64_t h = 0; h < heads; h++) {
                            int64_t high = offset + t, low = window && high >= window ? high - window + 1 : 0, kh = h / (heads / kv);
                            std::vector<double> e;
                            double total = 0;
                            for (int64_t p = low; p <= high; p++) {
                                double dot = 0;
                                for (int64_t i = 0; i < hd; i++) dot += q[size_t((t * heads + h) * hd + i)] * at(k, kh, p, i);
                                e.push_back(std::exp(0.3f * dot)), total += e.back();
                            }
                            for (int64_t i = 0; i < hd; i++) {
                                double sum = 0;
                                for (int64_t p = low; p <= high; p++) sum += e[size_t(p - low)] / total * at(v, kh, p, i);
                                check_close(out[size_t((t * heads + h) * hd + i)], sum, 10, "attention");
                            }
                        }
                }
}

void check_ffn(fs_workers* one, fs_workers* two, bool known) {
    for (const Kind& kind : kinds)
        for (int64_t d : {128, 384})
            for (int64_t n : {0, 1, 11})
                for (int64_t tokens : {1, 3, 40}) {
                    const int64_t neurons = 20;
                    Stored gate = stored(neurons, d, kind.dtype, kind.group, kind.scale_dtype);
                    Stored up = stored(neurons, d, kind.dtype, kind.group, kind.scale_dtype);
                    Stored down = stored(neurons, d, kind.dtype, kind.group, kind.scale_dtype);
                    std::vector<uint8_t> slab;
                    std::vector<int64_t> offsets;
                    std::vector<int32_t> ids, cols;
                    int64_t vector = 0;
                    for (int64_t j = 0; j < n; j++) {
                        ids.push_back(int32_t(j + 3)), cols.push_back(int32_t(j)), offsets.push_back(int64_t(slab.size()));
                        gate.append(j + 3, slab), vector = int64_t(slab.size()) - offsets.back();
                        up.append(j + 3, slab), down.append(j + 3, slab);
                    }
                    fs_record record{0, -1, vector, -1, 2 * vector, d, kind.dtype, gate.scale_dtype, kind.group, FS_RELU, 0, 1};
                    std::vector<float> x = normal(tokens * d), activated = normal(tokens * neurons);
                    for (auto& value : activated) value = value > 0 ? value : 0;
                    std::vector<uint8_t> mask(size_t(tokens * neurons));
                    for (auto& value : mask) value = uniform() > -0.5;
                    int64_t width = n > 0 ? n : 1;
                    auto run = [&](fs_workers* workers, int64_t first, int64_t count, std::vector<float>& hidden) {
                        std::vector<float> y(size_t(count * d), 0.0f);
                        hidden.assign(size_t(count * width), NAN);
                        fs_ffn_hidden(workers, &record, slab.data(), offsets.data(), ids.data(), cols.data(), n, x.data() + first * d, count,
                                      known ? activated.data() + first * neurons : nullptr, known ? nullptr : mask.data() + first * neurons,
                                      neurons, hidden.data(), width);
                        fs_ffn_down(workers, &record, slab.data(), offsets.data(), cols.data(), n, hidden.data(), width, count, y.data());
                        return y;
                    };
                    std::vector<float> hidden, other, y = run(two, 0, tokens, hidden);
                    std::string what = std::string("ffn ") + names[kind.dtype];
                    check(same(y, run(one, 0, tokens, other)) && (n == 0 || same(hidden, other)), what + ": threads change bits");
                    std::vector<float> last = run(two, tokens - 1, 1, other);
                    check(memcmp(last.data(), y.data() + (tokens - 1) * d, last.size() * 4) == 0, what + ": tokens change bits");
                    for (int64_t t = 0; t < tokens; t++) {
                        std::vector<double> sums(size_t(d), 0.0), sizes(size_t(d), 0.0);
                        for (int64_t j = 0; j < n; j++) {
                            int64_t i = j + 3;
                            double g = 0, u = 0, gs = 0, us = 0;
                            for (int64_t k = 0; k < d; k++) {
                                double a = gate.values[size_t(i * d + k)] * x[size_t(t * d + k)], b = up.values[size_t(i * d + k)] * x[size_t(t * d + k)];
                                g += a, u += b, gs += std::fabs(a), us += std::fabs(b);
                            }
                            if (known) g = gs = activated[size_t(t * neurons + i)];
                            else if (g < 0 || !mask[size_t(t * neurons + i)]) g = gs = 0;
                            double found = hidden[size_t(t * width + j)];
                            check_close(found, g * u, 10 * gs * us + 1e-3 * gs + 1e-3 * us, what + " hidden");
                            for (int64_t k = 0; k < d; k++) {
                                double w = down.values[size_t(i * d + k)];
                                sums[size_t(k)] += found * w, sizes[size_t(k)] += std::fabs(found) * (std::fabs(w) + 10);
                            }
                        }
                        for (int64_t k = 0; k < d; k++) check_close(y[size_t(t * d + k)], sums[size_t(k)], sizes[size_t(k)], what + " down");
                    }
                }
}

void check_choices() {
    float g[] = {-2, -0.0f, 0.5f, 3, NAN};
    float relu[5], silu[5], fat[5];
    memcpy(relu, g, 20), memcpy(silu, g, 20), memcpy(fat, g, 20);
    fs_activate(relu, 5, FS_RELU2, 0), fs_activate(silu, 5, FS_SILU, 0), fs_activate(fat, 5, FS_FATRELU, 1);
    check(relu[0] == 0 && relu[3] == 9 && std::isnan(relu[4]), "relu2");
    check_close(silu[0], -2 / (1 + std::exp(2.0)), 1, "silu");
    check(fat[2] == 0 && fat[3] == 3 && std::isnan(fat[4]), "fatrelu");
    float active[] = {0, 0, 1, 0, NAN, 0};
    int32_t ids[3];
    check(fs_active(active, 2, 3, ids) == 2 && ids[0] == 1 && ids[1] == 2, "active: union of tokens, NaN counts");
    uint8_t mask[6];
    float scores[] = {1, 5, 2, NAN, 0, 7};
    check(fs_select(scores, 2, 3, 2, mask, ids) == 3 && mask[0] == 0 && mask[2] == 1 && mask[3] == 1, "select");
    check(fs_select_topk(scores, 2, 3, 1, -1, mask, ids) == 2 && mask[1] && mask[3] && !mask[5], "select_topk: NaN is the largest");
    check(fs_active(active, 0, 3, ids) == 0, "active: no tokens");
}

}  // namespace

int main() {
    check(fs_abi_version() == FS_ABI_VERSION, "interface version");
    fs_workers *one = fs_workers_create(1), *two = fs_workers_create(2);
    for (std::string name : {std::string(fs_isa()), std::string("portable")}) {
        check(fs_set_isa(name.c_str()) == 0, "choosing " + name);
        check_linear(one, two), check_not_finite(two), check_score(two), check_gather(), check_attention(one, two);
        check_ffn(one, two, true), check_ffn(one, two, false);
        if (name == "portable") break;
    }
    check_choices();
    fs_workers_destroy(one), fs_workers_destroy(two);
    printf("%d of %d checks failed\n", failures, checks);
    return failures > 0;
}
