/* Activations in bfloat16, where the CPU multiplies pairs of them: codes are exact in bfloat16, sums are float32.
 *
 * A pair are the columns 0 and 2, 1 and 3, 4 and 6, or 5 and 7 of eight, in this order: so both codes of a pair lie 16
 * bits apart in a lane, and one permutation of 16-bit words turns them into bfloat16. Its index has 5 bits, of which the
 * upper one belongs to another code; the table holds everything twice. */

INLINE vf vf_dot_pairs(vf sum, vi a, vi b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

INLINE vi nibbles_as_bfloat16(void) { /* -8 .. 7 */
    return _mm512_broadcast_i64x4(_mm256_setr_epi32(
        (int)0xc0e0c100, (int)0xc0a0c0c0, (int)0xc040c080, (int)0xbf80c000, 0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0));
}

/* Two bytes of each lane, 16 bits apart, as u - 128: the upper halves of floats that have nothing in their lower halves. */
INLINE vi bytes_as_bfloat16(vi v, const int first) {
    const vi low = _mm512_castps_si512(vf_byte(v, first)), high = _mm512_castps_si512(vf_byte(v, first + 2));
    return _mm512_or_si512(high, _mm512_srli_epi32(low, 16));
}

/* Pair j of 4, of one vector of output features; `low` and `high` are the first and last four columns. */
#define PAIR_OF(bits, low, high, j) \
    ((bits) == 4 ? _mm512_permutexvar_epi16(vi_shift_right(low, 8 * ((j) % 2) + 4 * ((j) / 2)), nibbles_as_bfloat16()) \
                 : bytes_as_bfloat16((j) < 2 ? low : high, (j) % 2))

/* Few tokens: x [length / 2][tile] pairs, w as in layer.h, y [tile][32]. */
INLINE void few_pairs(const vq_layer *layer, int64_t at, const int32_t *x, const uint8_t *w, int64_t length,
                      const float *totals, float *y, const int tile, const int bits) {
    const int32_t *a = x;
#define DECLARE(r) vf left##r = vf_set(0), right##r = vf_set(0), left_odd##r = vf_set(0), right_odd##r = vf_set(0);
    EACH(DECLARE, FEW)
#undef DECLARE
    for (int64_t chunk = length / 8; chunk > 0; chunk--, w += 32 * bits, a += 4 * tile) {
        const vi low0 = vi_load(w), low1 = vi_load(w + 4 * VW);
        const vi high0 = bits == 8 ? vi_load(w + 4 * VQ_COLUMNS) : low0;
        const vi high1 = bits == 8 ? vi_load(w + 4 * (VQ_COLUMNS + VW)) : low1;
#define ROW_EVEN(r) if (tile > r) \
        left##r = vf_dot_pairs(left##r, w0, vi_set(c[r])), right##r = vf_dot_pairs(right##r, w1, vi_set(c[r]));
#define ROW_ODD(r) if (tile > r && tile < 4) { \
        left_odd##r = vf_dot_pairs(left_odd##r, w0, vi_set(c[r])), right_odd##r = vf_dot_pairs(right_odd##r, w1, vi_set(c[r])); \
    } else ROW_EVEN(r)
#define PAIR_STEP(j, ROW) { \
        const int32_t *c = a + (j) * tile; \
        const vi w0 = PAIR_OF(bits, low0, high0, j), w1 = PAIR_OF(bits, low1, high1, j); \
        EACH(ROW, FEW) \
    }
        PAIR_STEP(0, ROW_EVEN) PAIR_STEP(1, ROW_ODD) PAIR_STEP(2, ROW_EVEN) PAIR_STEP(3, ROW_ODD)
#undef ROW_EVEN
#undef ROW_ODD
#undef PAIR_STEP
    }
#define ADD(r) if (tile > r) { \
        add_floats(layer, at, vf_add(left##r, left_odd##r), totals[r], y + r * VQ_COLUMNS); \
        add_floats(layer, at + VW, vf_add(right##r, right_odd##r), totals[r], y + r * VQ_COLUMNS + VW); \
    }
    EACH(ADD, FEW)
#undef ADD
}

/* `length` columns of 32 output features as pairs: to [length / 2][32]. */
INLINE void unpack_pairs(const uint8_t *w, int64_t length, int32_t *to, const int bits) {
    for (int64_t chunk = 0; chunk < length / 8; chunk++, w += 32 * bits, to += 4 * VQ_COLUMNS) {
        UNROLL for (int vector = 0; vector < VQ_COLUMNS / VW; vector++) {
            const vi low = vi_load(w + 4 * VW * vector);
            const vi high = bits == 8 ? vi_load(w + 4 * (VQ_COLUMNS + VW * vector)) : low;
#define STEP(j) vi_store(to + (j) * VQ_COLUMNS + VW * vector, PAIR_OF(bits, low, high, j));
            EACH_4(STEP)
#undef STEP
        }
    }
}

/* As few_pairs, with unpacked weights w [length / 2][32]. */
INLINE void tile_pairs(const vq_layer *layer, int64_t at, const int32_t *x, const int32_t *w, int64_t length,
                       const float *totals, float *y, const int tile) {
    const int32_t *a = x;
#define DECLARE(r) vf left##r = vf_set(0), right##r = vf_set(0);
    EACH(DECLARE, TILE)
#undef DECLARE
    for (int64_t i = length / 2; i > 0; i--, a += tile, w += VQ_COLUMNS) {
        const vi w0 = vi_load(w), w1 = vi_load(w + VW);
#define ROW(r) if (tile > r) { \
        const vi two = vi_set(a[r]); \
        left##r = vf_dot_pairs(left##r, w0, two), right##r = vf_dot_pairs(right##r, w1, two); \
    }
        EACH(ROW, TILE)
#undef ROW
    }
#define ADD(r) if (tile > r) { \
        add_floats(layer, at, left##r, totals[r], y + r * VQ_COLUMNS); \
        add_floats(layer, at + VW, right##r, totals[r], y + r * VQ_COLUMNS + VW); \
    }
    EACH(ADD, TILE)
#undef ADD
}

/* One slice of a block, for all tokens of the chunk. */
INLINE void slice_pairs(const vq_layer *layer, const vq_packed *packed, int64_t at, int64_t column, const uint8_t *codes,
                        int64_t length, const float *totals, float *y, const int bits) {
    const int64_t columns = vq_groups(layer) * vq_padded(layer);
    int32_t w[VQ_SLICE / 2 * VQ_COLUMNS] __attribute__((aligned(64)));
    if (packed->tokens > FEW) unpack_pairs(codes, length, w, bits);
    for (int64_t first = 0; first < packed->tokens; first += TILE) {
        const int64_t rest = packed->tokens - first;
        const int tile = rest < TILE ? (int)rest : TILE;
        const int32_t *x = packed->codes + (first * columns + column * tile) / 2;
        float *to = y + first * VQ_COLUMNS;
        if (packed->tokens <= FEW) {
            switch (tile) {
#define CASE(r) case r + 1: few_pairs(layer, at, x, codes, length, totals, to, r + 1, bits); break;
                EACH(CASE, FEW)
#undef CASE
            }
        } else {
            switch (tile) {
#define CASE(r) case r + 1: tile_pairs(layer, at, x, w, length, totals + first, to, r + 1); break;
                EACH(CASE, TILE)
#undef CASE
            }
        }
    }
}

/* Activations of one token: pairs into their place of the tile, and the sum of each slice. */
static void pack_pairs(const vq_call *call, const vq_packed *packed, int64_t token, int64_t m) {
    const vq_layer *layer = call->layer;
    const int64_t groups = vq_groups(layer), padded = vq_padded(layer), size = layer->group, first = m / TILE * TILE;
    const int64_t tile = packed->tokens - first < TILE ? packed->tokens - first : TILE;
    const uint16_t *x = (const uint16_t *)call->x + token * call->stride;
    int32_t *to = packed->codes + first * groups * padded / 2 + m - first;
    float *sums = packed->float_sums + m;
    static const int ORDER[VQ_PAD] = {0, 2, 1, 3, 4, 6, 5, 7};
    for (int64_t g = 0; g < groups; g++, x += size) {
        for (int64_t start = 0; start < padded; start += VQ_SLICE, sums += packed->tokens) {
            const int64_t end = start + VQ_SLICE < padded ? start + VQ_SLICE : padded;
            float sum = 0;
            for (int64_t i = start; i < end; i += VQ_PAD) {
                uint16_t eight[VQ_PAD] = {0}, ordered[VQ_PAD];
                memcpy(eight, x + i, (size_t)(i + VQ_PAD <= size ? VQ_PAD : size - i) * sizeof *x);
                for (int j = 0; j < VQ_PAD; j++) ordered[j] = eight[ORDER[j]];
                for (int j = 0; j < VQ_PAD / 2; j++, to += tile) memcpy(to, ordered + 2 * j, sizeof *to);
                for (int j = 0; j < VQ_PAD && layer->shift; j++) {
                    const uint32_t bits = (uint32_t)eight[j] << 16;
                    float value;
                    memcpy(&value, &bits, sizeof value);
                    sum += value;
                }
            }
            *sums = sum;
        }
    }
}
