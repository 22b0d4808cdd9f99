#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define VQ_ISA avx512vnni
#define VQ_VNNI
#include "packed.h"
#include "simd_avx512.h"

#include "kernels.h"
#include "integers.h"
#include "output.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
