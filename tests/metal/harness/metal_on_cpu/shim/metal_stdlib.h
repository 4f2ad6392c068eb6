// The part of Metal's standard library that kernels here may use, in C++17 for a CPU. Compiled with each kernel, so it
// includes no system header. What is missing is missing on purpose: a kernel that needs more must first have it modelled.
//
// Not modelled: address spaces (they are erased), swizzles, textures, simdgroup_matrix, fast math, half-precision fma.
#pragma once

#include "runtime.h"

#define MSL_INLINE inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef i64 int64_t;
typedef u64 uint64_t;
typedef i32 int32_t;
typedef u32 uint32_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef ulong size_t;
typedef long ptrdiff_t;

namespace metal {

template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool c, class A, class B> using conditional_t = typename conditional<c, A, B>::type;
template <bool c, class A = void> struct enable_if {};
template <class A> struct enable_if<true, A> { typedef A type; };
template <bool c, class A = void> using enable_if_t = typename enable_if<c, A>::type;

template <class To, class From> MSL_INLINE To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// --- 16-bit floats: stored bits, arithmetic in float rounded to nearest even after each operation ----------------------
// (exact for + - * / and sqrt: a float has more than twice their digits plus two)

struct half {
    ushort bits;
    half() = default;
    MSL_INLINE half(float value) : bits(from(value)) {}
    MSL_INLINE operator float() const { return to(bits); }
    static MSL_INLINE float to(ushort h) {
        u32 magnitude = u32(h & 0x7fff) << 13, sign = u32(h & 0x8000) << 16;
        if (magnitude >= u32(31) << 23) return as_type<float>(sign | magnitude | 0x7f800000);
        return as_type<float>(sign | as_type<u32>(as_type<float>(magnitude) * 0x1p112f));
    }
    static MSL_INLINE ushort from(float value) {
        u32 all = as_type<u32>(value), sign = all >> 16 & 0x8000, v = all & 0x7fffffff;
        if (v > 0x7f800000) return ushort(sign | 0x7e00 | (v >> 13 & 0x3ff));
        if (v >= 0x47800000) return ushort(sign | 0x7c00);
        if (v < 0x38800000) {  // subnormal halves: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
            return ushort(sign | (as_type<u32>(as_type<float>(v) + 0.5f) - 0x3f000000));
        }
        return ushort(sign | ((v - 0x38000000 + 0xfff + (v >> 13 & 1)) >> 13));
    }
};

struct bfloat {
    ushort bits;
    bfloat() = default;
    MSL_INLINE bfloat(float value) : bits(from(value)) {}
    MSL_INLINE operator float() const { return as_type<float>(u32(bits) << 16); }
    static MSL_INLINE ushort from(float value) {
        u32 v = as_type<u32>(value);
        if ((v & 0x7fffffff) > 0x7f800000) return ushort(v >> 16 | 0x40);
        return ushort((u64(v) + 0x7fff + (v >> 16 & 1)) >> 16);
    }
};

template <class T> struct is_small { static constexpr bool value = is_same_v<T, half> || is_same_v<T, bfloat>; };
template <class T> using small_t = enable_if_t<is_small<T>::value, T>;
#define MSL_SMALL(op) \
    template <class T> MSL_INLINE small_t<T> operator op(T a, T b) { return T(float(a) op float(b)); } \
    template <class T, class U> MSL_INLINE enable_if_t<is_small<T>::value, T&> operator op##=(T& a, U b) { \
        return a = T(float(a) op float(b)); \
    }
MSL_SMALL(+) MSL_SMALL(-) MSL_SMALL(*) MSL_SMALL(/)
template <class T> MSL_INLINE small_t<T> operator-(T a) { return as_type<T>(ushort(a.bits ^ 0x8000)); }

// --- vectors: members x y z w and [i], component-wise operators; no swizzles --------------------------------------------

template <class T, int n> struct vec;
template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
    T x, y;
    vec() = default;
    MSL_INLINE vec(T a) : x(a), y(a) {}
    MSL_INLINE vec(T a, T b) : x(a), y(b) {}
    template <class U> MSL_INLINE explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
    MSL_INLINE T& operator[](int i) { return (&x)[i]; }
    MSL_INLINE const T& operator[](int i) const { return (&x)[i]; }
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
    T x, y, z;
    vec() = default;
    MSL_INLINE vec(T a) : x(a), y(a), z(a) {}
    MSL_INLINE vec(T a, T b, T c) : x(a), y(b), z(c) {}
    template <class U> MSL_INLINE explicit vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
    MSL_INLINE T& operator[](int i) { return (&x)[i]; }
    MSL_INLINE const T& operator[](int i) const { return (&x)[i]; }
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
    T x, y, z, w;
    vec() = default;
    MSL_INLINE vec(T a) : x(a), y(a), z(a), w(a) {}
    MSL_INLINE vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
    template <class U> MSL_INLINE explicit vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
    MSL_INLINE T& operator[](int i) { return (&x)[i]; }
    MSL_INLINE const T& operator[](int i) const { return (&x)[i]; }
};
// A packed vector is aligned like one element; it converts to and from the vector.
template <class T, int n> struct packed_vec {
    T at[n];
    packed_vec() = default;
    MSL_INLINE packed_vec(vec<T, n> v) { for (int i = 0; i < n; i++) at[i] = v[i]; }
    MSL_INLINE operator vec<T, n>() const {
        vec<T, n> v;
        for (int i = 0; i < n; i++) v[i] = at[i];
        return v;
    }
    MSL_INLINE T& operator[](int i) { return at[i]; }
    MSL_INLINE const T& operator[](int i) const { return at[i]; }
};

#define MSL_VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4; \
    typedef packed_vec<T, 2> packed_##T##2; typedef packed_vec<T, 3> packed_##T##3; typedef packed_vec<T, 4> packed_##T##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(short)
MSL_VECTORS(ushort) MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(bool)

#define MSL_COMPONENTS(op) \
    template <class T, int n> MSL_INLINE vec<T, n> operator op(vec<T, n> a, vec<T, n> b) { \
        for (int i = 0; i < n; i++) a[i] = a[i] op b[i]; \
        return a; \
    } \
    template <class T, int n> MSL_INLINE vec<T, n> operator op(vec<T, n> a, T b) { return a op vec<T, n>(b); } \
    template <class T, int n> MSL_INLINE vec<T, n> operator op(T a, vec<T, n> b) { return vec<T, n>(a) op b; } \
    template <class T, int n> MSL_INLINE vec<T, n>& operator op##=(vec<T, n>& a, vec<T, n> b) { return a = a op b; }
MSL_COMPONENTS(+) MSL_COMPONENTS(-) MSL_COMPONENTS(*) MSL_COMPONENTS(/) MSL_COMPONENTS(&) MSL_COMPONENTS(|)
MSL_COMPONENTS(^) MSL_COMPONENTS(<<) MSL_COMPONENTS(>>)

template <class T, int n> MSL_INLINE T dot(vec<T, n> a, vec<T, n> b) {
    T sum = a[0] * b[0];
    for (int i = 1; i < n; i++) sum = sum + a[i] * b[i];
    return sum;
}

// --- mathematics: floats only, as precise as the CPU's library ---------------------------------------------------------

#define MSL_ONE(name) MSL_INLINE float name(float v) { return __builtin_##name##f(v); }
MSL_ONE(exp) MSL_ONE(exp2) MSL_ONE(log) MSL_ONE(log2) MSL_ONE(sqrt) MSL_ONE(tanh) MSL_ONE(sin) MSL_ONE(cos) MSL_ONE(erf)
MSL_ONE(floor) MSL_ONE(ceil) MSL_ONE(trunc) MSL_ONE(round) MSL_ONE(rint) MSL_ONE(fabs)
MSL_INLINE float rsqrt(float v) { return 1.0f / __builtin_sqrtf(v); }
MSL_INLINE float pow(float a, float b) { return __builtin_powf(a, b); }
MSL_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_INLINE bool isnan(float v) { return v != v; }
MSL_INLINE bool isinf(float v) { return __builtin_fabsf(v) == __builtin_inff(); }
MSL_INLINE bool isfinite(float v) { return __builtin_fabsf(v) < __builtin_inff(); }
// Of a number and NaN the number, as Metal's fmax and max.
MSL_INLINE float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
MSL_INLINE float fmin(float a, float b) { return __builtin_fminf(a, b); }
MSL_INLINE float max(float a, float b) { return __builtin_fmaxf(a, b); }
MSL_INLINE float min(float a, float b) { return __builtin_fminf(a, b); }
MSL_INLINE float abs(float v) { return __builtin_fabsf(v); }
MSL_INLINE float clamp(float v, float low, float high) { return fmin(fmax(v, low), high); }
#define MSL_INTEGER(T) \
    MSL_INLINE T max(T a, T b) { return a > b ? a : b; } \
    MSL_INLINE T min(T a, T b) { return a < b ? a : b; } \
    MSL_INLINE T clamp(T v, T low, T high) { return min(max(v, low), high); } \
    MSL_INLINE T select(T no, T yes, bool c) { return c ? yes : no; }
MSL_INTEGER(int) MSL_INTEGER(uint) MSL_INTEGER(long) MSL_INTEGER(ulong) MSL_INTEGER(short) MSL_INTEGER(ushort)
MSL_INLINE int abs(int v) { return v < 0 ? -v : v; }
MSL_INLINE float select(float no, float yes, bool c) { return c ? yes : no; }
MSL_INLINE uint popcount(uint v) { return uint(__builtin_popcount(v)); }
MSL_INLINE uint clz(uint v) { return v ? uint(__builtin_clz(v)) : 32; }
MSL_INLINE uint ctz(uint v) { return v ? uint(__builtin_ctz(v)) : 32; }
namespace precise { using metal::exp; using metal::log; using metal::sqrt; using metal::rsqrt; using metal::tanh; using metal::fma; }

template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
    static constexpr float infinity() { return __builtin_inff(); }
    static constexpr float quiet_NaN() { return __builtin_nanf(""); }
    static constexpr float max() { return __FLT_MAX__; }
    static constexpr float min() { return __FLT_MIN__; }
    static constexpr float lowest() { return -__FLT_MAX__; }
};

// --- simdgroup operations: every lane of the simdgroup must reach the same one ------------------------------------------

template <class T, class F> struct MslOperation {
    static void resolve(MslTicket* const* tickets, int count, u32 argument) {
        T values[32];
        u32 lanes[32];
        for (int i = 0; i < count; i++) values[i] = *(const T*)tickets[i]->in, lanes[i] = tickets[i]->lane;
        for (int i = 0; i < count; i++) *(T*)tickets[i]->out = F::of(values, lanes, count, i, argument);
    }
};
template <class F, class T> MSL_INLINE T msl_together(T value, u32 argument, u32 line) {
    T out = value;
    MslTicket ticket = {&value, &out, 0, &MslOperation<T, F>::resolve, argument};
    msl_collective(&ticket, line);
    return out;
}

// The order of the sum is a tree over lanes: xor distances 16, 8, 4, 2, 1, the same for every lane.
template <class T, class Op> inline T msl_tree(const T* values, int count) {
    T level[32];
    for (int i = 0; i < 32; i++) level[i] = i < count ? values[i] : values[0];
    bool present[32];
    for (int i = 0; i < 32; i++) present[i] = i < count;
    for (int distance = 16; distance; distance /= 2)
        for (int i = 0; i < distance; i++) {
            if (present[i] && present[i + distance]) level[i] = Op::of(level[i], level[i + distance]);
            else if (present[i + distance]) level[i] = level[i + distance], present[i] = true;
        }
    return level[0];
}
#define MSL_BINARY(name, expression) \
    struct name { template <class T> static T of(T a, T b) { return expression; } };
MSL_BINARY(MslAdd, T(a + b)) MSL_BINARY(MslMultiply, T(a * b)) MSL_BINARY(MslMax, a < b || a != a ? b : a)
MSL_BINARY(MslMin, b < a || a != a ? b : a) MSL_BINARY(MslAnd, a & b) MSL_BINARY(MslOr, a | b) MSL_BINARY(MslXor, a ^ b)
template <class Op> struct MslReduce {
    template <class T> static T of(const T* v, const u32*, int n, int, u32) { return msl_tree<T, Op>(v, n); }
};
template <class Op, bool inclusive> struct MslScan {
    template <class T> static T of(const T* v, const u32*, int, int i, u32) {
        T sum = T(0);
        for (int k = 0; k < i + inclusive; k++) sum = Op::of(sum, v[k]);
        return sum;
    }
};
// Reading a lane that does not take part is undefined in Metal: here it is divergence.
template <class T> inline T msl_of_lane(const T* v, const u32* lanes, int n, u32 wanted) {
    for (int i = 0; i < n; i++)
        if (lanes[i] == wanted) return v[i];
    msl_missing_lane(wanted);
    return v[0];
}
struct MslBroadcast { template <class T> static T of(const T* v, const u32* l, int n, int, u32 a) { return msl_of_lane(v, l, n, a); } };
struct MslXorShuffle { template <class T> static T of(const T* v, const u32* l, int n, int i, u32 a) { return msl_of_lane(v, l, n, l[i] ^ a); } };
struct MslDown { template <class T> static T of(const T* v, const u32* l, int n, int i, u32 a) { return l[i] + a < 32 ? msl_of_lane(v, l, n, l[i] + a) : v[i]; } };
struct MslUp { template <class T> static T of(const T* v, const u32* l, int n, int i, u32 a) { return l[i] >= a ? msl_of_lane(v, l, n, l[i] - a) : v[i]; } };

#define MSL_LINE u32 line = __builtin_LINE()
#define MSL_REDUCE(name, Op) template <class T> MSL_INLINE T name(T v, MSL_LINE) { return msl_together<MslReduce<Op>>(v, 0, line); }
MSL_REDUCE(simd_sum, MslAdd) MSL_REDUCE(simd_product, MslMultiply) MSL_REDUCE(simd_max, MslMax) MSL_REDUCE(simd_min, MslMin)
MSL_REDUCE(simd_and, MslAnd) MSL_REDUCE(simd_or, MslOr) MSL_REDUCE(simd_xor, MslXor)
template <class T> MSL_INLINE T simd_prefix_exclusive_sum(T v, MSL_LINE) { return msl_together<MslScan<MslAdd, false>>(v, 0, line); }
template <class T> MSL_INLINE T simd_prefix_inclusive_sum(T v, MSL_LINE) { return msl_together<MslScan<MslAdd, true>>(v, 0, line); }
template <class T> MSL_INLINE T simd_broadcast(T v, ushort lane, MSL_LINE) { return msl_together<MslBroadcast>(v, lane, line); }
template <class T> MSL_INLINE T simd_shuffle_xor(T v, ushort mask, MSL_LINE) { return msl_together<MslXorShuffle>(v, mask, line); }
template <class T> MSL_INLINE T simd_shuffle_down(T v, ushort by, MSL_LINE) { return msl_together<MslDown>(v, by, line); }
template <class T> MSL_INLINE T simd_shuffle_up(T v, ushort by, MSL_LINE) { return msl_together<MslUp>(v, by, line); }
MSL_INLINE bool simd_any(bool v, MSL_LINE) { return msl_together<MslReduce<MslOr>>(u32(v), 0, line); }
MSL_INLINE bool simd_all(bool v, MSL_LINE) { return msl_together<MslReduce<MslAnd>>(u32(v), 0, line); }

// --- barriers and atomics ------------------------------------------------------------------------------------------------

enum class mem_flags : u32 { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MSL_INLINE mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(u32(a) | u32(b)); }
MSL_INLINE void threadgroup_barrier(mem_flags flags, MSL_LINE) { msl_threadgroup_barrier(u32(flags), line); }
MSL_INLINE void simdgroup_barrier(mem_flags flags, MSL_LINE) { msl_simdgroup_barrier(u32(flags), line); }

enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
    static_assert(sizeof(T) == 4, "atomics are of 32 bits");
    T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
#define MSL_ATOMIC(name, operation) \
    template <class T, class V> MSL_INLINE T name(atomic<T>* at, V v, memory_order) { \
        return as_type<T>(msl_atomic(at, operation, as_type<u32>(T(v)), is_same_v<T, int>)); \
    }
template <class T> MSL_INLINE T atomic_load_explicit(const atomic<T>* at, memory_order) {
    return as_type<T>(msl_atomic((void*)at, kAtomicLoad, 0, 0));
}
template <class T, class V> MSL_INLINE void atomic_store_explicit(atomic<T>* at, V v, memory_order) {
    msl_atomic(at, kAtomicStore, as_type<u32>(T(v)), 0);
}
MSL_ATOMIC(atomic_exchange_explicit, kAtomicExchange) MSL_ATOMIC(atomic_fetch_sub_explicit, kAtomicSub)
MSL_ATOMIC(atomic_fetch_min_explicit, kAtomicMin) MSL_ATOMIC(atomic_fetch_max_explicit, kAtomicMax)
MSL_ATOMIC(atomic_fetch_and_explicit, kAtomicAnd) MSL_ATOMIC(atomic_fetch_or_explicit, kAtomicOr)
MSL_ATOMIC(atomic_fetch_xor_explicit, kAtomicXor)
template <class T, class V> MSL_INLINE T atomic_fetch_add_explicit(atomic<T>* at, V v, memory_order) {
    if constexpr (is_same_v<T, float>) {  // one lane runs at a time, so a load, a sum and an update are one operation
        T old = as_type<T>(msl_atomic(at, kAtomicOr, 0, 0));
        msl_atomic(at, kAtomicExchange, as_type<u32>(old + T(v)), 0);
        return old;
    } else {
        return as_type<T>(msl_atomic(at, kAtomicAdd, as_type<u32>(T(v)), 0));
    }
}

}  // namespace metal

using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;

// A threadgroup declaration of the source becomes a reference into the threadgroup's memory (see translate.py).
template <class T, u32 declaration> MSL_INLINE T& msl_shared() {
    return *(T*)msl_threadgroup_memory(declaration, sizeof(T), alignof(T));
}
