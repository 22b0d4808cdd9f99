/* 4 lanes in the vector extensions of gcc and clang: NEON on ARM, SSE2 on x86, and whatever else there is.
 * With dot products of bytes in hardware where the compiler was told that the CPU has them (VQ_NEON_DOT). */
#include <math.h>
#include <string.h>
#ifdef VQ_NEON_DOT
#include <arm_neon.h>
#endif

#define VW 4
#define TILE 8 /* tokens in the innermost loops */
#define FEW 4   /* up to so many tokens, weights are unpacked in registers */

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vq_unsigned __attribute__((vector_size(16)));

INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_set(float x) { return (vf){x, x, x, x}; }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vi vi_choose(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }
INLINE vf vf_min(vf a, vf b) { return (vf)vi_choose(a < b, (vi)a, (vi)b); }
INLINE vf vf_max(vf a, vf b) { return (vf)vi_choose(a > b, (vi)a, (vi)b); }
INLINE vi vi_set(int32_t x) { return (vi){x, x, x, x}; }
INLINE vf vf_abs(vf a) { return (vf)((vi)a & vi_set(0x7fffffff)); }

INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE void vi_store(void *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE void vi_store_bytes(int8_t *p, vi v) {
    for (int i = 0; i < VW; i++) p[i] = (int8_t)v[i];
}
INLINE vi vi_and(vi a, vi b) { return a & b; }
INLINE vi vi_add(vi a, vi b) { return (vi)((vq_unsigned)a + (vq_unsigned)b); }
INLINE vi vi_sub(vi a, vi b) { return (vi)((vq_unsigned)a - (vq_unsigned)b); }
INLINE vi vi_mul(vi a, vi b) { return (vi)((vq_unsigned)a * (vq_unsigned)b); }
#define vi_shift_right(a, count) ((vi)((vq_unsigned)(a) >> (count)))
INLINE vi vi_round(vf a) {
    vi v;
    for (int i = 0; i < VW; i++) v[i] = (int32_t)nearbyintf(a[i]);
    return v;
}
INLINE vf vi_float(vi a) { return __builtin_convertvector(a, vf); }

/* The 4 bits from `shift` on of each lane, as u - 8. */
#define vf_nibble(v, shift) vi_float((vi_shift_right(v, shift) & vi_set(15)) - vi_set(8))

/* Byte `j` of each lane, as u - 128. */
#define vf_byte(v, j) vi_float((vi_shift_right(v, 8 * (j)) & vi_set(255)) - vi_set(128))

/* Lanes + sums of 4 products of bytes: unsigned u, signed a. `u` is at most 15 in vi_dot_small. */
#ifdef VQ_NEON_DOT
INLINE vi vi_dot_small(vi sum, vi u, vi a) {
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)u, (int8x16_t)a);
}
INLINE vi vi_dot(vi sum, vi u, vi a) { /* u = (u - 128) + 128, and the first fits into int8 */
    const int8x16_t high = vdupq_n_s8(-128);
    int32x4_t v = vdotq_s32((int32x4_t)sum, veorq_s8((int8x16_t)u, high), (int8x16_t)a);
    return (vi)vsubq_s32(v, vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-1), (int8x16_t)a), 7));
}
#else
INLINE vi vi_dot(vi sum, vi u, vi a) {
    for (int byte = 0; byte < 4; byte++) {
        vi left = vi_shift_right(u, 8 * byte) & vi_set(255);
        vi right = ((vi_shift_right(a, 8 * byte) & vi_set(255)) ^ vi_set(128)) - vi_set(128);
        sum = vi_add(sum, left * right);
    }
    return sum;
}
INLINE vi vi_dot_small(vi sum, vi u, vi a) { return vi_dot(sum, u, a); }
#endif

/* float16 has 5 bits of exponent: its values are floats times 2^-112 once their bits are in place. */
INLINE vf vf_load_half(const uint16_t *p) {
    vf result;
    for (int i = 0; i < VW; i++) {
        uint32_t bits = (uint32_t)(p[i] & 0x7fff) << 13;
        float x;
        memcpy(&x, &bits, sizeof x);
        x *= 0x1p112f;
        memcpy(&bits, &x, sizeof x);
        if ((p[i] & 0x7c00) == 0x7c00) bits |= 0x7f800000;
        bits |= (uint32_t)(p[i] & 0x8000) << 16;
        memcpy(&x, &bits, sizeof x);
        result[i] = x;
    }
    return result;
}
INLINE void vf_store_half(uint16_t *p, vf v) {
    for (int i = 0; i < VW; i++) {
        float x = v[i] < 0 ? -v[i] : v[i], magic;
        uint32_t bits, sign;
        memcpy(&bits, (char *)&v + 4 * i, sizeof bits);
        sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) {
            p[i] = (uint16_t)(sign | 0x7e00);
        } else if (bits >= 0x477ff000) { /* rounds to more than 65504 */
            p[i] = (uint16_t)(sign | 0x7c00);
        } else if (bits < 0x38800000) { /* subnormal: adding 0.5 moves the last place to where it must be */
            magic = x + 0.5f;
            memcpy(&bits, &magic, sizeof bits);
            p[i] = (uint16_t)(sign | (bits - 0x3f000000));
        } else {
            bits += 0xfff + (bits >> 13 & 1);
            p[i] = (uint16_t)(sign | ((bits - 0x38000000) >> 13));
        }
    }
}
