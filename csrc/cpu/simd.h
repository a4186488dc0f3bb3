// Vectors of one instruction set, on GCC's and Clang's vector extension: the same source is SSE2,
// AVX2, AVX-512 or NEON, depending on the flags it is compiled with. Included by the kernels alone;
// everything has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gfl {
namespace {  // each instruction set has its own

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define GFL_INLINE static inline __attribute__((always_inline))

// 16-bit floating types as they lie in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef double F64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t I64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as U32

template <typename T>
struct VectorTraits;
template <>
struct VectorTraits<F32> {
  using scalar = float;
  using integer = I32;
};
template <>
struct VectorTraits<F64> {
  using scalar = double;
  using integer = I64;
};
template <typename T>
using scalar_t = typename VectorTraits<T>::scalar;

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename S>
constexpr S smallest();
template <>
constexpr float smallest<float>() {
  return 1.1754943508222875e-38f;
}
template <>
constexpr double smallest<double>() {
  return 2.2250738585072014e-308;
}

// The primitives math.h is written in

template <typename T>
struct Broadcast {
  GFL_INLINE T make(scalar_t<T> value) { return T{} + value; }
};
template <typename T>
GFL_INLINE T broadcast(scalar_t<T> value) {
  return Broadcast<T>::make(value);
}
GFL_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
GFL_INLINE F64 select(I64 mask, F64 yes, F64 no) { return mask ? yes : no; }

// The larger of the two; b if either is NaN: x86's own rule, for which GCC makes two instructions
// of a select.
GFL_INLINE F32 maximum(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F32)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}
GFL_INLINE F64 maximum(F64 a, F64 b) { return select(a > b, a, b); }
GFL_INLINE F32 negative_abs(F32 x) { return (F32)((U32)x | 0x80000000u); }
GFL_INLINE F64 negative_abs(F64 x) { return (F64)((I64)x | INT64_MIN); }

// 2^n for t = n + bias + 1.5 * 2^(mantissa bits), where n + bias stands in the low bits.
GFL_INLINE F32 shift_exponent(F32 t) { return (F32)((I32)t << 23); }
GFL_INLINE F64 shift_exponent(F64 t) { return (F64)((I64)t << 52); }

// v = 2^n m with m in [sqrt(1/2), sqrt(2)), for normal v > 0. NaN has NaN as its m.
GFL_INLINE F32 split_mantissa(F32 v, F32* n) {
  const I32 exponent = ((I32)v - 0x3f3504f3) >> 23;
  *n = __builtin_convertvector(exponent, F32);
  const F32 m = (F32)((I32)v - (exponent << 23));
  return select(v == v, m, v);
}
GFL_INLINE F64 split_mantissa(F64 v, F64* n) {
  // Vectors have no cheap 64-bit integer conversion or arithmetic shift below AVX-512: the exponent
  // is counted in the low bits of 1.5 * 2^52, as exponential() does it the other way round.
  const I64 offset = (I64)v - 0x3fe6a09e667f3bcd + ((int64_t)1023 << 52);
  const I64 biased = (I64)((U64)offset >> 52);
  *n = (F64)(biased | 0x4338000000000000) - (6755399441055744.0 + 1023.0);
  const F64 m = (F64)((I64)v - ((biased - 1023) << 52));
  return select(v == v, m, v);
}
template <typename T>
GFL_INLINE T reciprocal(T x) {
  return scalar_t<T>(1) / x;
}
GFL_INLINE F32 square_root(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (F32)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
GFL_INLINE F64 square_root(F64 x) {
#if defined(__AVX512F__)
  return (F64)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (F64)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (F64)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}
// floor for |t| < 2^22.
template <typename T>
GFL_INLINE T floor_small(T t) {
  using S = scalar_t<T>;
  constexpr S magic = sizeof(S) == 4 ? S(12582912.0) : S(6755399441055744.0);
  const T nearest = (t + magic) - magic;
  return nearest - select(nearest > t, broadcast<T>(S(1)), broadcast<T>(S(0)));
}

// Several vectors as one

#define GFL_WIDE(expression) _Pragma("GCC unroll 8") for (int u = 0; u < n; ++u) expression

// The formulas are chains of some twenty-five dependent operations, and a processor's scheduler
// holds too few of them to fill its units out of one chain after the other. A Wide runs n chains
// abreast, operation by operation.
template <typename V, int n>
struct Wide {
  V of[n];
  Wide() = default;
  // Vector by vector: as an array GCC copies it through memory, eight bytes at a time, and formulas
  // that return a struct of them took a quarter longer.
  __attribute__((always_inline)) Wide(const Wide& other) { GFL_WIDE(of[u] = other.of[u];) }
  __attribute__((always_inline)) Wide& operator=(const Wide& other) {
    GFL_WIDE(of[u] = other.of[u];)
    return *this;
  }
  V& operator[](int u) { return of[u]; }
  const V& operator[](int u) const { return of[u]; }
};
template <typename V, int n>
struct VectorTraits<Wide<V, n>> {
  using scalar = scalar_t<V>;
  using integer = Wide<typename VectorTraits<V>::integer, n>;
};

#define GFL_WIDE_OPERATOR(op)                                             \
  template <typename V, int n>                                            \
  GFL_INLINE auto operator op(const Wide<V, n>& a, const Wide<V, n>& b) { \
    Wide<decltype(a[0] op b[0]), n> r;                                    \
    GFL_WIDE(r[u] = a[u] op b[u];)                                        \
    return r;                                                             \
  }                                                                       \
  template <typename V, int n>                                            \
  GFL_INLINE auto operator op(const Wide<V, n>& a, scalar_t<V> b) {       \
    Wide<decltype(a[0] op b), n> r;                                       \
    GFL_WIDE(r[u] = a[u] op b;)                                           \
    return r;                                                             \
  }                                                                       \
  template <typename V, int n>                                            \
  GFL_INLINE auto operator op(scalar_t<V> a, const Wide<V, n>& b) {       \
    Wide<decltype(a op b[0]), n> r;                                       \
    GFL_WIDE(r[u] = a op b[u];)                                           \
    return r;                                                             \
  }
GFL_WIDE_OPERATOR(+)
GFL_WIDE_OPERATOR(-)
GFL_WIDE_OPERATOR(*)
GFL_WIDE_OPERATOR(/)
GFL_WIDE_OPERATOR(<)
GFL_WIDE_OPERATOR(>)
GFL_WIDE_OPERATOR(<=)
GFL_WIDE_OPERATOR(>=)
GFL_WIDE_OPERATOR(==)
#undef GFL_WIDE_OPERATOR

template <typename I, int n>
GFL_INLINE Wide<I, n> operator|(const Wide<I, n>& a, const Wide<I, n>& b) {
  Wide<I, n> r;
  GFL_WIDE(r[u] = a[u] | b[u];)
  return r;
}
template <typename V, int n>
GFL_INLINE Wide<V, n> operator-(const Wide<V, n>& a) {
  Wide<V, n> r;
  GFL_WIDE(r[u] = -a[u];)
  return r;
}
template <typename I, typename V, int n>
GFL_INLINE Wide<V, n> select(const Wide<I, n>& mask, const Wide<V, n>& yes, const Wide<V, n>& no) {
  Wide<V, n> r;
  GFL_WIDE(r[u] = select(mask[u], yes[u], no[u]);)
  return r;
}
template <typename V, int n>
GFL_INLINE Wide<V, n> spread(V v) {
  Wide<V, n> r;
  GFL_WIDE(r[u] = v;)
  return r;
}
template <typename V, int n>
struct Broadcast<Wide<V, n>> {
  GFL_INLINE Wide<V, n> make(scalar_t<V> value) { return spread<V, n>(Broadcast<V>::make(value)); }
};

#define GFL_WIDE_FUNCTION(name)                     \
  template <typename V, int n>                      \
  GFL_INLINE Wide<V, n> name(const Wide<V, n>& a) { \
    Wide<V, n> r;                                   \
    GFL_WIDE(r[u] = name(a[u]);)                    \
    return r;                                       \
  }
GFL_WIDE_FUNCTION(negative_abs)
GFL_WIDE_FUNCTION(shift_exponent)
GFL_WIDE_FUNCTION(reciprocal)
GFL_WIDE_FUNCTION(square_root)

template <typename V, int n>
GFL_INLINE Wide<V, n> maximum(const Wide<V, n>& a, const Wide<V, n>& b) {
  Wide<V, n> r;
  GFL_WIDE(r[u] = maximum(a[u], b[u]);)
  return r;
}
template <typename V, int n>
GFL_INLINE Wide<V, n> split_mantissa(const Wide<V, n>& v, Wide<V, n>* exponent) {
  Wide<V, n> r;
  GFL_WIDE(r[u] = split_mantissa(v[u], &(*exponent)[u]);)
  return r;
}

#if defined(__AVX512F__)
// 2^(n / 16) for t = n + 1.5 * 2^23: what n mod 16 makes of it lies in a register.
GFL_INLINE F32 power_of_sixteenths(F32 t) {
  const F32 roots = {1.0f,          1.0442737824f, 1.0905077327f, 1.1387886348f,
                     1.1892071150f, 1.2418578121f, 1.2968395547f, 1.3542555469f,
                     1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
                     1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
  return (F32)((U32)__builtin_shuffle(roots, (I32)t) + (((U32)t & ~15u) << 19));
}
GFL_WIDE_FUNCTION(power_of_sixteenths)
// What is missing to it, as a part of it: the roots are rounded.
GFL_INLINE F32 rest_of_sixteenths(F32 t) {
  const F32 rest = {0.0f,         4.6285e-08f,  -1.1992e-08f, 4.7298e-08f,
                    3.1934e-08f,  3.6211e-08f,  -3.0991e-08f, -7.4752e-09f,
                    1.7114e-08f,  -3.0477e-08f, 5.2333e-09f,  6.1076e-09f,
                    -1.4720e-08f, -5.2588e-09f, -6.1283e-09f, 5.1406e-09f};
  return __builtin_shuffle(rest, (I32)t);
}
GFL_WIDE_FUNCTION(rest_of_sixteenths)
#endif
#undef GFL_WIDE_FUNCTION

// Loads and stores: S in memory, a vector of A in registers

// Unaligned vector in memory.
template <typename V>
struct __attribute__((packed, may_alias)) Unaligned {
  V value;
};
template <typename V>
GFL_INLINE V load_raw(const void* p) {
  return static_cast<const Unaligned<V>*>(p)->value;
}
template <typename V>
GFL_INLINE void store_raw(void* p, V value) {
  static_cast<Unaligned<V>*>(p)->value = value;
}

// Two neighbours in memory.
template <typename A>
struct TwoOf {
  typedef A type __attribute__((vector_size(2 * sizeof(A))));
};
template <typename A>
using Two = typename TwoOf<A>::type;

GFL_INLINE F32 widen(U16 bits, bfloat16) { return (F32)(__builtin_convertvector(bits, U32) << 16); }
GFL_INLINE U16 narrow(F32 value, bfloat16) {
  const U32 bits = (U32)value;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const I32 nan = value != value;
  return __builtin_convertvector(nan ? (bits >> 16) | 0x40u : rounded, U16);
}

GFL_INLINE F32 widen(U16 half, float16) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)half);
#else
  const U32 h = __builtin_convertvector(half, U32);
  const U32 sign = (h & 0x8000u) << 16;
  const U32 rest = h & 0x7fffu;
  // Shifted into place a finite half is 2^-112 of its value. Numbers below 2^-14 would be denormal
  // floats on the way, which DAZ removes: they are counted as integers instead.
  const F32 normal = (F32)((rest << 13) + (112u << 23));
  const F32 tiny = __builtin_convertvector((I32)rest, F32) * 5.9604644775390625e-8f;
  const F32 special = (F32)((rest << 13) | 0x7f800000u);
  const F32 value =
      select((I32)(rest < 0x400u), tiny, select((I32)(rest >= 0x7c00u), special, normal));
  return (F32)((U32)value | sign);
#endif
}
GFL_INLINE U16 narrow(F32 value, float16) {
#if defined(__AVX512F__)
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (U16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 bits = (U32)value;
  const U32 sign = (bits & 0x80000000u) >> 16;
  const U32 rest = bits & 0x7fffffffu;
  const U32 normal = ((rest + 0xfffu + ((rest >> 13) & 1u)) >> 13) - (112u << 10);
  // Below 2^-14 the unit is 2^-24: adding 1.5 * 2^-1 leaves it in the low bits, rounded to nearest
  // even.
  const U32 tiny = (U32)((F32)rest + 0.75f) & 0x7ffu;
  U32 half = (U32)select((I32)(rest < 0x38800000u), (F32)tiny, (F32)normal);
  half = (U32)select((I32)(rest >= 0x477ff000u), (F32)(U32{} + 0x7c00u), (F32)half);
  half = (U32)select((I32)(rest > 0x7f800000u), (F32)(U32{} + 0x7e00u), (F32)half);
  return __builtin_convertvector(half | sign, U16);
#endif
}

// A full vector.
GFL_INLINE F32 load(const float* p) { return load_raw<F32>(p); }
GFL_INLINE F64 load(const double* p) { return load_raw<F64>(p); }
template <typename H>
GFL_INLINE F32 load(const H* p) {
  return widen(load_raw<U16>(p), H{});
}
GFL_INLINE void store(float* p, F32 v) { store_raw(p, v); }
GFL_INLINE void store(double* p, F64 v) { store_raw(p, v); }
template <typename H>
GFL_INLINE void store(H* p, F32 v) {
  store_raw(p, narrow(v, H{}));
}

// A full vector, past the caches; p is aligned to it. Ends with flush_stream().
template <typename A>
GFL_INLINE void stream(A* p, Vector<A> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#else
  store(p, v);
#endif
}
// What has been streamed comes before what is stored from now on.
GFL_INLINE void flush_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first n entries; the other lanes are 0 and touch no memory.
template <typename S>
GFL_INLINE auto load_first(const S* p, int n) {
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t{1} << n) - 1;  // n may be all lanes
  if constexpr (sizeof(S) == 8) {
    return (F64)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  } else if constexpr (sizeof(S) == 4) {
    return (F32)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else {
    return widen((U16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p), S{});
  }
#else
  S buffer[kVectorBytes / (sizeof(S) == 8 ? 8 : 4)] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
template <typename S, typename V>
GFL_INLINE void store_first(S* p, V v, int n) {
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t{1} << n) - 1;  // n may be all lanes
  if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)narrow(v, S{}));
  }
#else
  S buffer[kVectorBytes / (sizeof(S) == 8 ? 8 : 4)];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// v with the lanes from n on set to 0.
template <typename V>
GFL_INLINE V first_lanes(V v, int n) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>);
  typename VectorTraits<V>::integer number;
  for (int i = 0; i < lanes; ++i) number[i] = i;
  return select(number < n, v, V{});
}

// Sum of the lanes, in a fixed order, in double.
template <typename V>
GFL_INLINE double sum_lanes(V v) {
  double total = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(scalar_t<V>); ++i) total += static_cast<double>(v[i]);
  return total;
}

// Transposition of a square of lanes x lanes

// Lane l of the result is lane pick(l) of a followed by b.
template <typename V, typename F>
GFL_INLINE V shuffle(V a, V b, const F& pick) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>);
  typename VectorTraits<V>::integer index;
  for (int l = 0; l < lanes; ++l) index[l] = pick(l);
  return __builtin_shuffle(a, b, index);
}

// a0, b0, a1, b1, ... in two vectors, and back.
template <typename V>
GFL_INLINE void zip(V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>);
  const V low = shuffle(a, b, [](int l) { return l / 2 + l % 2 * lanes; });
  b = shuffle(a, b, [](int l) { return lanes / 2 + l / 2 + l % 2 * lanes; });
  a = low;
}
template <typename V>
GFL_INLINE void unzip(V& a, V& b) {
  const V even = shuffle(a, b, [](int l) { return 2 * l; });
  b = shuffle(a, b, [](int l) { return 2 * l + 1; });
  a = even;
}

// Blocks of `size` lanes: the even ones of a and b interleaved, or the odd ones (unpack within 128
// bits, for a size of 1 or 2 and n = 4); and all even blocks of a before all of b.
template <int size, typename V>
GFL_INLINE void interleave(V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>),
                n = 16 / static_cast<int>(sizeof(scalar_t<V>));
  const auto pick = [](int l, int half) {
    const int in = l % n, block = in / size, from = half * n / 2 + block / 2 * size + in % size;
    return l - in + from + (block & 1) * lanes;
  };
  const V low = shuffle(a, b, [&](int l) { return pick(l, 0); });
  b = shuffle(a, b, [&](int l) { return pick(l, 1); });
  a = low;
}

// The low half of a before that of b, and the high halves.
template <typename V>
GFL_INLINE void join_halves(V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>), half = lanes / 2;
  const V low = shuffle(a, b, [](int l) { return l < half ? l : l - half + lanes; });
  b = shuffle(a, b, [](int l) { return l < half ? l + half : l + lanes; });
  a = low;
}

// Of 128-bit blocks: the even ones of a before those of b, and the odd ones.
template <typename V>
GFL_INLINE void part_blocks(V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>),
                n = 16 / static_cast<int>(sizeof(scalar_t<V>)), half = lanes / 2;
  const auto pick = [](int l, int odd) {
    const int in = l % half;
    return (in / n * 2 + odd) * n + in % n + (l < half ? 0 : lanes);
  };
  const V even = shuffle(a, b, [&](int l) { return pick(l, 0); });
  b = shuffle(a, b, [&](int l) { return pick(l, 1); });
  a = even;
}

// rows[i] lane j <-> rows[j] lane i. First within 128-bit blocks, where a shuffle costs least, then
// the blocks.
template <typename V>
GFL_INLINE void transpose(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>),
                n = 16 / static_cast<int>(sizeof(scalar_t<V>));
#pragma GCC unroll 16
  for (int g = 0; g < lanes; g += n) {
    if constexpr (n == 4) {
      interleave<1>(rows[g], rows[g + 1]);
      interleave<1>(rows[g + 2], rows[g + 3]);
      interleave<2>(rows[g], rows[g + 2]);
      interleave<2>(rows[g + 1], rows[g + 3]);
      const V second = rows[g + 1];
      rows[g + 1] = rows[g + 2];
      rows[g + 2] = second;
    } else {
      interleave<1>(rows[g], rows[g + 1]);
    }
  }
  // rows[g n + j] holds, in block b, column b n + j of the rows g n, g n + 1, ...
#pragma GCC unroll 16
  for (int j = 0; j < n; ++j) {
    if constexpr (lanes / n == 2) join_halves(rows[j], rows[n + j]);
    if constexpr (lanes / n == 4) {
      V &a = rows[j], &b = rows[n + j], &c = rows[2 * n + j], &d = rows[3 * n + j];
      join_halves(a, b);
      join_halves(c, d);
      part_blocks(a, c);
      part_blocks(b, d);
      const V second = b;  // a, b, c, d are the columns of the blocks 0, 2, 1, 3
      b = c;
      c = second;
    }
  }
}

// Lane i: the sum of the lanes of rows[i]. The steps of a transposition, each followed by an
// addition.
template <typename V>
GFL_INLINE V sum_each(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(scalar_t<V>),
                n = 16 / static_cast<int>(sizeof(scalar_t<V>));
  const auto pair = [](V& a, V& b) __attribute__((always_inline)) { a = a + b; };
#pragma GCC unroll 16
  for (int g = 0; g < lanes; g += n) {
#pragma GCC unroll 2
    for (int i = 0; i < n; i += 2) {
      interleave<1>(rows[g + i], rows[g + i + 1]);
      pair(rows[g + i], rows[g + i + 1]);
    }
    if constexpr (n == 4) {
      interleave<2>(rows[g], rows[g + 2]);
      pair(rows[g], rows[g + 2]);
    }
  }
  // rows[g] holds, in each block, a part of the sums of the rows g, g + 1, ...
  if constexpr (lanes / n >= 2) {
#pragma GCC unroll 2
    for (int g = 0; g < lanes; g += 2 * n) {
      join_halves(rows[g], rows[g + n]);
      pair(rows[g], rows[g + n]);
    }
  }
  if constexpr (lanes / n == 4) {
    part_blocks(rows[0], rows[2 * n]);
    pair(rows[0], rows[2 * n]);
  }
  return rows[0];
}

// Transposition of packed rows, of K = m N + 1 bins for N lanes
//
// N rows without gaps are K whole vectors. Bin k of row i, the element i K + k = m N i + (i + k),
// is in lane j = (i + k) mod N; and in vector m (j - k) mod K, since N m = -1 mod K. So all lanes
// hold the bins in the same order, but lane j lags j m vectors behind lane 0. Turning it back by
// j m is a step per bit of j, and a step costs one blend per vector. Bin k then is vector
// -m k = k / N mod K, row i in lane (i + k) mod N. That makes whole loads and log2(N) operations
// per vector. A square takes as many, but shuffles, which fewer units can do, and leaves a column.

// v[r] gets from v[r + step] the lanes whose number has `bit`. In place and in an order in which
// nearly all vectors may be overwritten.
template <int K, int bit, int step, typename V>
GFL_INLINE void turn_lanes(V* v) {
  typename VectorTraits<V>::integer moves;
  for (size_t l = 0; l < sizeof(V) / sizeof(scalar_t<V>); ++l) moves[l] = l & bit ? -1 : 0;
  const V first = v[0];
#pragma GCC unroll 64
  for (int i = 0; i < K; ++i) {
    const int r = i * step % K;
    v[r] = select(moves, i < K - 1 ? v[(r + step) % K] : first, v[r]);
  }
}

// The turn of the upper half of the lanes and the rotation are one shuffle of two vectors.
template <int K, int i, typename V>
GFL_INLINE void turn_to_columns(const V* v, V* columns) {
  if constexpr (i < K) {
    constexpr int N = sizeof(V) / sizeof(scalar_t<V>), step = K / N * (N / 2);
    constexpr int r = i * step % K, k = r * N % K;
    columns[k] = shuffle(v[r], v[(r + step) % K], [](int l) {
      const int lane = (l + k) % N;
      return lane + (lane < N / 2 ? 0 : N);
    });
    turn_to_columns<K, i + 1>(v, columns);
  }
}
template <int K, int i, typename V>
GFL_INLINE void turn_from_columns(const V* columns, V* v) {
  if constexpr (i < K) {
    constexpr int N = sizeof(V) / sizeof(scalar_t<V>), step = K - K / N * (N / 2);
    constexpr int r = i * step % K, k = r * N % K, upper = (r + step) * N % K;
    v[r] = shuffle(columns[k], columns[upper], [](int l) {
      return l < N / 2 ? (l + K * N - k) % N : (l + K * N - upper) % N + N;
    });
    turn_from_columns<K, i + 1>(columns, v);
  }
}

// columns[k] lane i = bin k of row i, out of the rows' elements v; and back. v is overwritten.
template <int K, typename V>
GFL_INLINE void columns_of_packed(V* v, V* columns) {
  constexpr int N = sizeof(V) / sizeof(scalar_t<V>), m = K / N;
  static_assert(K % N == 1 && (N == 8 || N == 16));
  turn_lanes<K, 1, m>(v);
  turn_lanes<K, 2, 2 * m>(v);
  if constexpr (N == 16) turn_lanes<K, 4, 4 * m>(v);
  turn_to_columns<K, 0>(v, columns);
}
template <int K, typename V>
GFL_INLINE void packed_of_columns(const V* columns, V* v) {
  constexpr int N = sizeof(V) / sizeof(scalar_t<V>), m = K / N;
  static_assert(K % N == 1 && (N == 8 || N == 16));
  turn_from_columns<K, 0>(columns, v);
  if constexpr (N == 16) turn_lanes<K, 4, K - 4 * m>(v);
  turn_lanes<K, 2, K - 2 * m>(v);
  turn_lanes<K, 1, K - m>(v);
}

// Flush denormals to zero while in scope. A logit around -33 or -95 makes denormal products, at 100
// cycles each.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  explicit FlushDenormals(bool flush) : saved_(_mm_getcsr()) {
    if (flush) _mm_setcsr(saved_ | 0x8040);
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  explicit FlushDenormals(bool flush) {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (flush) asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  explicit FlushDenormals(bool) {}
#endif
};

}  // namespace

#if defined(__AVX512F__)
// Beside math.h's own, not in the namespace of this file's, whose names would hide them.

// math.h's exponential with a polynomial of degree 3 in place of 6, for a table of 16 fits a
// vector: 7 multiplications for 10, of which a Zen 4 starts one a cycle. Max relative error: 7e-8.
template <bool kBounded, typename T>
GFL_INLINE T exponential_by_table(T x) {
  const T t = x * (16 * 1.44269504f) + 12582912.0f;
  const T n = t - 12582912.0f;
  T r = x - n * (0.693359375f / 16);
  r = r - n * (-2.12194440e-4f / 16);
  const T p = (r * (1 / 6.0f) + 0.5f) * r + 1.0f;
  const T power = power_of_sixteenths(t);
  const T e = power * (p * r + rest_of_sixteenths(t)) + power;
  return kBounded ? e : select(x < -87.33f, broadcast<T>(0.0f), e);
}
template <bool kBounded = false>
GFL_INLINE F32 exponential(F32 x) {
  return exponential_by_table<kBounded>(x);
}
template <bool kBounded = false, int n>
GFL_INLINE Wide<F32, n> exponential(Wide<F32, n> x) {
  return exponential_by_table<kBounded>(x);
}
#endif

}  // namespace gfl
