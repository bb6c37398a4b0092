// Everything below works on 16 float lanes (VF), 16 int32 lanes (VI) or 64 bytes: one panel of 16 outputs is one vector.
// A new instruction set is one file with these functions (see avx512vnni.h, avx2.h, portable.h); nothing else changes.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own intrinsics
#endif
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define INL inline __attribute__((always_inline, unused))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// How the integer digits of 4 consecutive k of one row lie in memory.
enum class Digits {
  S8,        // 4 bytes
  HIGH_LOW,  // 4 high bytes, 4 low bytes: x = 256 * high + low, both signed
  S16,       // 4 int16 in the order k0 k2 k1 k3: the bytes of a quad at even and at odd places
};
constexpr int digit_bytes(Digits f) { return f == Digits::S8 ? 4 : 8; }

template <class F, int... I> INL void each_(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0), f(1), ... f(N - 1) with constants.
template <int N, class F> INL void each(F&& f) { each_(f, std::make_integer_sequence<int, N>{}); }
#define LAMBDA [&](auto index_) __attribute__((always_inline))
