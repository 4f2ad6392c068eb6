// Declarations of Metal's types and functions for clang, with address spaces: what address_spaces.py type-checks a kernel
// against. Nothing here is compiled or run; metal_stdlib.h is what runs.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {

template <class T, int n> using vec = T __attribute__((ext_vector_type(n)));
#define VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
VECTORS(float) VECTORS(half) VECTORS(int) VECTORS(uint) VECTORS(short) VECTORS(ushort) VECTORS(char) VECTORS(uchar)
VECTORS(long) VECTORS(ulong)

template <class To, class From> To as_type(From from) { return __builtin_bit_cast(To, from); }

#define ONE(name) float name(float);
ONE(exp) ONE(exp2) ONE(log) ONE(log2) ONE(sqrt) ONE(rsqrt) ONE(tanh) ONE(sin) ONE(cos) ONE(floor) ONE(ceil) ONE(trunc)
ONE(round) ONE(rint) ONE(fabs)
namespace precise { ONE(exp) ONE(log) ONE(sqrt) ONE(rsqrt) ONE(tanh) }
float fma(float, float, float);
float pow(float, float);
float fmax(float, float);
float fmin(float, float);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
#define COMPARED(T) T max(T, T); T min(T, T); T clamp(T, T, T); T abs(T); T select(T, T, bool);
COMPARED(float) COMPARED(int) COMPARED(uint) COMPARED(long) COMPARED(ulong)
uint popcount(uint);
uint clz(uint);
uint ctz(uint);

#define OVER_LANES(name) template <class T> T name(T);
OVER_LANES(simd_sum) OVER_LANES(simd_product) OVER_LANES(simd_max) OVER_LANES(simd_min) OVER_LANES(simd_and)
OVER_LANES(simd_or) OVER_LANES(simd_xor) OVER_LANES(simd_prefix_exclusive_sum) OVER_LANES(simd_prefix_inclusive_sum)
template <class T> T simd_broadcast(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_shuffle_down(T, ushort);
template <class T> T simd_shuffle_up(T, ushort);
bool simd_any(bool);
bool simd_all(bool);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
#define ATOMICS(space) \
  template <class T> T atomic_load_explicit(const space atomic<T>*, memory_order); \
  template <class T, class V> void atomic_store_explicit(space atomic<T>*, V, memory_order); \
  CHANGE(space, exchange) CHANGE(space, fetch_add) CHANGE(space, fetch_sub) CHANGE(space, fetch_min) \
  CHANGE(space, fetch_max) CHANGE(space, fetch_and) CHANGE(space, fetch_or) CHANGE(space, fetch_xor)
#define CHANGE(space, name) template <class T, class V> T atomic_##name##_explicit(space atomic<T>*, V, memory_order);
ATOMICS(device) ATOMICS(threadgroup)

}  // namespace metal

using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
