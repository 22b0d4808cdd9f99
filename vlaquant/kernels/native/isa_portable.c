#define VQ_ISA portable
#include "packed.h"
#include "simd_portable.h"

#include "kernels.h"
#include "integers.h"
#include "output.h"
