/* Int8 activations: exact sums of products in int32, one slice of a group after the other. */

/* y += scale * (sum - offset * total - zero * sums), for one vector of output features. */
INLINE void add_codes(const vq_layer *layer, int64_t at, vi sum, int32_t total, int first, float *y) {
    sum = vi_sub(sum, vi_mul(vi_load(layer->offset + at), vi_set(total)));
    if (layer->sums && first) sum = vi_sub(sum, vi_mul(vi_load(layer->sums + at), vi_set(layer->input_zero)));
    vf_store(y, vf_fma(vi_float(sum), vf_load(layer->scale + at), vf_load(y)));
}

#define ADD(r) if (tile > r) { \
        float *to = y + r * VQ_COLUMNS + PAIR * pair; \
        add_codes(layer, at + PAIR * pair, left##r, totals[r], first, to); \
        add_codes(layer, at + PAIR * pair + VW, right##r, totals[r], first, to + VW); \
    }

/* 4 bits, few tokens: codes go from memory through registers into products. x [length / 4][tile], y [tile][32]. */
INLINE void few_codes(const vq_layer *layer, int64_t at, const int32_t *x, const uint8_t *w, int64_t length,
                      const int32_t *totals, int first, float *y, const int tile) {
    const vi half = vi_set(0x0f0f0f0f);
    for (int pair = 0; pair < PAIRS; pair++) {
        const int32_t *a = x;
        const uint8_t *b = w + 4 * PAIR * pair;
#define DECLARE(r) vi left##r = vi_set(0), right##r = vi_set(0), left_odd##r = vi_set(0), right_odd##r = vi_set(0);
        EACH(DECLARE, FEW)
#undef DECLARE
        for (int64_t chunk = length / 8; chunk > 0; chunk--, b += 4 * VQ_COLUMNS, a += 2 * tile) {
            const vi both0 = vi_load(b), both1 = vi_load(b + 4 * VW);
            const vi low0 = vi_and(both0, half), high0 = vi_and(vi_shift_right(both0, 4), half);
            const vi low1 = vi_and(both1, half), high1 = vi_and(vi_shift_right(both1, 4), half);
#define ROW(r) if (tile > r) { \
        const vi four = vi_set(a[r]), next = vi_set(a[tile + r]); \
        left##r = vi_dot_small(left##r, low0, four), right##r = vi_dot_small(right##r, low1, four); \
        if (tile < 4) { \
            left_odd##r = vi_dot_small(left_odd##r, high0, next), right_odd##r = vi_dot_small(right_odd##r, high1, next); \
        } else { \
            left##r = vi_dot_small(left##r, high0, next), right##r = vi_dot_small(right##r, high1, next); \
        } \
    }
            EACH(ROW, FEW)
#undef ROW
        }
#define JOIN_ODD(r) if (tile > r && tile < 4) left##r = vi_add(left##r, left_odd##r), right##r = vi_add(right##r, right_odd##r);
        EACH(JOIN_ODD, FEW)
#undef JOIN_ODD
        EACH(ADD, FEW)
    }
}

/* 4-bit codes of `length` columns and 32 output features as bytes, in the layout of 8 bits. */
static void unpack_codes(const uint8_t *w, int64_t length, uint8_t *to) {
    const vi half = vi_set(0x0f0f0f0f);
    for (int64_t chunk = 0; chunk < length / 8; chunk++, w += 4 * VQ_COLUMNS, to += 8 * VQ_COLUMNS) {
        UNROLL for (int vector = 0; vector < VQ_COLUMNS / VW; vector++) {
            const vi both = vi_load(w + 4 * VW * vector);
            vi_store(to + 4 * VW * vector, vi_and(both, half));
            vi_store(to + 4 * (VQ_COLUMNS + VW * vector), vi_and(vi_shift_right(both, 4), half));
        }
    }
}

/* As few_codes, with a byte for each code: w [length / 4][32], four neighbours each. */
INLINE void tile_codes(const vq_layer *layer, int64_t at, const int32_t *x, const uint8_t *w, int64_t length,
                       const int32_t *totals, int first, float *y, const int tile, const int bits) {
    for (int pair = 0; pair < PAIRS; pair++) {
        const int32_t *a = x;
        const uint8_t *b = w + 4 * PAIR * pair;
#define DECLARE(r) vi left##r = vi_set(0), right##r = vi_set(0);
        EACH(DECLARE, TILE)
#undef DECLARE
        for (int64_t i = length / 4; i > 0; i--, a += tile, b += 4 * VQ_COLUMNS) {
            const vi w0 = vi_load(b), w1 = vi_load(b + 4 * VW);
#define ROW(r) if (tile > r) { \
        const vi four = vi_set(a[r]); \
        left##r = bits == 4 ? vi_dot_small(left##r, w0, four) : vi_dot(left##r, w0, four); \
        right##r = bits == 4 ? vi_dot_small(right##r, w1, four) : vi_dot(right##r, w1, four); \
    }
            EACH(ROW, TILE)
#undef ROW
        }
        EACH(ADD, TILE)
    }
}
#undef ADD

/* One slice of a block, for all tokens of the chunk. */
INLINE void slice_codes(const vq_layer *layer, const vq_packed *packed, int64_t at, int64_t column, const uint8_t *codes,
                        int64_t length, const int32_t *totals, float *y, const int bits) {
    const int64_t columns = vq_groups(layer) * vq_padded(layer);
    const int few = bits == 4 && packed->tokens <= FEW, start = column % vq_padded(layer) == 0;
    uint8_t bytes[VQ_SLICE * VQ_COLUMNS] __attribute__((aligned(64)));
    const uint8_t *w = bits == 4 ? bytes : codes;
    if (bits == 4 && !few) unpack_codes(codes, length, bytes);
    for (int64_t first = 0; first < packed->tokens; first += TILE) {
        const int64_t rest = packed->tokens - first;
        const int tile = rest < TILE ? (int)rest : TILE;
        const int32_t *x = packed->codes + (first * columns + column * tile) / 4;
        float *to = y + first * VQ_COLUMNS;
        if (few) {
            switch (tile) {
#define CASE(r) case r + 1: few_codes(layer, at, x, codes, length, totals, start, to, r + 1); break;
                EACH(CASE, FEW)
#undef CASE
            }
        } else {
            switch (tile) {
#define CASE(r) case r + 1: tile_codes(layer, at, x, w, length, totals + first, start, to, r + 1, bits); break;
                EACH(CASE, TILE)
#undef CASE
            }
        }
    }
}
