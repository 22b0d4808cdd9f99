#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define VQ_ISA avx512bf16
#define VQ_VNNI
#define VQ_BF16
#include "packed.h"
#include "simd_avx512.h"

#include "kernels.h"
#include "integers.h"
#include "output.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
