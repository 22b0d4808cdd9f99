#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define VQ_ISA avx2
#include "packed.h"
#include "simd_avx2.h"

#include "kernels.h"
#include "integers.h"
#include "output.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
