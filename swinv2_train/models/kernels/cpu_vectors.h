// Vectors of floats, of the width that this processor has, and what the kernels share of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr long LANES = 16;  // floats per vector
constexpr int REGISTERS = 16;  // accumulators of a tile, half of what there is
constexpr int MOST_VECTORS = 4;  // of a tile's row
#else
constexpr long LANES = 8;
constexpr int REGISTERS = 12;  // of 16: two vectors of B and an entry of A are the others
constexpr int MOST_VECTORS = 2;
#endif
constexpr long ROUND = 16;  // N and d become multiples of it
constexpr long LINE_BYTES = 64;  // of the cache; buffers begin at one, so that no vector lies across two

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4)));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector v) { *reinterpret_cast<Vector*>(x) = v; }
inline Vector fill(float x) { return x - Vector{}; }

struct BFloat16 {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));

// A vector of a map, and one into it: to the nearest, ties to even (the instruction takes subnormals for zero).
inline Vector widen(const float* x) { return load(x); }
inline Vector widen(const BFloat16* x) {
  const Halves bits = *reinterpret_cast<const Halves*>(x);
  return (Vector)(__builtin_convertvector(bits, Integers) << 16);
}
inline void narrow(Vector x, float* y) { store(y, x); }
#ifdef __AVX512BF16__
inline void narrow(Vector x, BFloat16* y) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
inline void narrow(Vector x, BFloat16* y) {
  const Integers bits = (Integers)x;
  const Integers rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Integers number = x == x ? rounded : Integers{} + 0x7fc0;
  *reinterpret_cast<Halves*>(y) = __builtin_convertvector(number, Halves);
}
#endif

#ifdef __AVX512F__
inline float sum(Vector v) { return _mm512_reduce_add_ps((__m512)v); }
inline float largest(Vector v) { return _mm512_reduce_max_ps((__m512)v); }
#elif defined(__AVX__)
inline float sum(Vector v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vector v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#else
inline float sum(Vector v) {
  float total = 0;
  for (long i = 0; i < LANES; i++) total += v[i];
  return total;
}
inline float largest(Vector v) {
  float most = v[0];
  for (long i = 1; i < LANES; i++) most = std::max(most, v[i]);
  return most;
}
#endif

// e^x for x <= 0 to 2 units in the last place; 0 below -87.
inline Vector exponential(Vector x) {
  const Vector power = x * 1.44269504088896341f;
  const Integers whole = __builtin_convertvector(power - 0.5f, Integers);  // x <= 0: rounds to the nearest
  const Vector n = __builtin_convertvector(whole, Vector);
  Vector r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers bits = (Integers)p + (whole << 23);
  return x < -87.0f ? Vector{} : (Vector)bits;
}

// Floats that begin where a line of the cache does.
template <typename T>
struct Aligned {
  typedef T value_type;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(LINE_BYTES))); }
  void deallocate(T* x, size_t) { ::operator delete(x, std::align_val_t(LINE_BYTES)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<float, Aligned<float>> Floats;

}  // namespace
