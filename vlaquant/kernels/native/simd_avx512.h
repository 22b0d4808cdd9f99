/* 16 lanes: AVX-512 F, BW, DQ, VL. With VQ_VNNI also the int8 dot product. */
#include <immintrin.h>

#define VW 16
#define TILE 12 /* tokens in the innermost loops */
#define FEW 8   /* up to so many tokens, weights are unpacked in registers */

typedef __m512 vf;
typedef __m512i vi;

INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }

INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi v) { _mm512_storeu_si512(p, v); }
INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE void vi_store_bytes(int8_t *p, vi v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v)); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
#define vi_shift_right(a, count) _mm512_srli_epi32(a, count)
INLINE vi vi_round(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }

/* The 4 bits from `shift` on of each lane, as u - 8. The permutation looks at the lowest 4 bits only. */
#define vf_nibble(v, shift) \
    _mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), \
                          _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7))

/* Byte `j` of each lane, as u - 128. */
#define vf_byte(v, j) \
    _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_xor_si512(v, vi_set((int)0x80808080)), 24 - 8 * (j)), 24))

/* Lanes + sums of 4 products of bytes: unsigned u, signed a. `u` is at most 15 in vi_dot_small. */
#ifdef VQ_VNNI
INLINE vi vi_dot(vi sum, vi u, vi a) { /* as an intrinsic, gcc 12 copies each sum to another register and to memory */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(a));
    return sum;
}
INLINE vi vi_dot_small(vi sum, vi u, vi a) { return vi_dot(sum, u, a); }
#else
INLINE vi vi_dot_small(vi sum, vi u, vi a) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(u, a), _mm512_set1_epi16(1)));
}
INLINE vi vi_dot(vi sum, vi u, vi a) { /* two products of 255 * 128 do not fit into 16 bits */
    const vi low = _mm512_set1_epi16(0xff);
    vi even = _mm512_madd_epi16(_mm512_and_si512(u, low), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
    vi odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(a, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
#endif

INLINE vf vf_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void vf_store_half(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
