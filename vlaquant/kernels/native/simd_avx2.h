/* 8 lanes: AVX2, FMA, F16C. */
#include <immintrin.h>

#define VW 8
#define TILE 6 /* tokens in the innermost loops */
#define FEW 4   /* up to so many tokens, weights are unpacked in registers */

typedef __m256 vf;
typedef __m256i vi;

INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void vi_store(void *p, vi v) { _mm256_storeu_si256((__m256i *)p, v); }
INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE void vi_store_bytes(int8_t *p, vi v) { /* the lowest byte of each lane */
    const vi fours = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));
    const __m128i low = _mm256_castsi256_si128(fours), high = _mm256_extracti128_si256(fours, 1);
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(low, high));
}
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
INLINE vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
#define vi_shift_right(a, count) _mm256_srli_epi32(a, count)
INLINE vi vi_round(vf a) { return _mm256_cvtps_epi32(a); }
INLINE vf vi_float(vi a) { return _mm256_cvtepi32_ps(a); }

/* The 4 bits from `shift` on of each lane, as u - 8. */
#define vf_nibble(v, shift) \
    _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(v, shift), vi_set(15)), vi_set(8)))

/* Byte `j` of each lane, as u - 128. */
#define vf_byte(v, j) \
    _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(_mm256_xor_si256(v, vi_set((int)0x80808080)), 24 - 8 * (j)), 24))

/* Lanes + sums of 4 products of bytes: unsigned u, signed a. `u` is at most 15 in vi_dot_small. */
INLINE vi vi_dot_small(vi sum, vi u, vi a) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), _mm256_set1_epi16(1)));
}
INLINE vi vi_dot(vi sum, vi u, vi a) { /* two products of 255 * 128 do not fit into 16 bits */
    const vi low = _mm256_set1_epi16(0xff);
    vi even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    vi odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(a, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

INLINE vf vf_load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void vf_store_half(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
