#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define VQ_ISA neon_dot
#define VQ_NEON_DOT
#include "packed.h"
#include "simd_portable.h"

#include "kernels.h"
#include "integers.h"
#include "output.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
