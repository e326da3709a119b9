// CUDA's vector types.
#pragma once

#define CUDA_VECTOR(T, name, alignment)                                                            \
  struct alignas(sizeof(T)) name##1 { T x; };                                                      \
  struct alignas(alignment < 2 * sizeof(T) ? alignment : 2 * sizeof(T)) name##2 { T x, y; };       \
  struct name##3 { T x, y, z; };                                                                   \
  struct alignas(alignment < 4 * sizeof(T) ? alignment : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##1 make_##name##1(T x) { return {x}; }                                               \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                       \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                               \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_VECTOR(signed char, char, 16)
CUDA_VECTOR(unsigned char, uchar, 16)
CUDA_VECTOR(short, short, 16)
CUDA_VECTOR(unsigned short, ushort, 16)
CUDA_VECTOR(int, int, 16)
CUDA_VECTOR(unsigned, uint, 16)
CUDA_VECTOR(long long, longlong, 16)
CUDA_VECTOR(unsigned long long, ulonglong, 16)
CUDA_VECTOR(float, float, 16)
CUDA_VECTOR(double, double, 16)
#undef CUDA_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
