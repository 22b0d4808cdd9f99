/* Int8 activations: exact sums of products in int32, one slice of a group after the other. */

/* What sums begin with, for one vector of output features: -(offset * total + zero * sums), as products are of codes
 * that no zero was taken from. */
INLINE vi first_codes(const vq_layer *layer, int64_t at, int32_t total, int first) {
    const vi sum = layer->offset ? vi_mul(vi_load(layer->offset + at), vi_set(-total)) : vi_set(-total * (1 << (layer->bits - 1)));
    if (!layer->sums || !first) return sum;
    return vi_sub(sum, vi_mul(vi_load(layer->sums + at), vi_set(layer->input_zero)));
}

/* y += scale * sum, for one vector of output features. */
INLINE void add_codes(const vq_layer *layer, int64_t at, vi sum, float *y) {
    vf_store(y, vf_fma(vi_float(sum), vf_load(layer->scale + at), vf_load(y)));
}

#define DECLARE(r) vi left##r, right##r; if (tile > r) { \
        left##r = first_codes(layer, at + PAIR * pair, totals[r], first); \
        right##r = first_codes(layer, at + PAIR * pair + VW, totals[r], first); \
    }
#define ADD(r) if (tile > r) { \
        add_codes(layer, at + PAIR * pair, left##r, y + r * VQ_COLUMNS + PAIR * pair); \
        add_codes(layer, at + PAIR * pair + VW, right##r, y + r * VQ_COLUMNS + PAIR * pair + VW); \
    }

/* 4 bits: codes go from memory through registers into products. x [length / 4][tile], y [tile][32]. */
INLINE void tile_nibbles(const vq_layer *layer, int64_t at, const int32_t *x, const uint8_t *w, int64_t length,
                         const int32_t *totals, int first, float *y, const int tile) {
    const vi half = vi_set(0x0f0f0f0f);
    for (int pair = 0; pair < PAIRS; pair++) {
        const int32_t *a = x;
        const uint8_t *b = w + 4 * PAIR * pair;
        EACH(DECLARE, TILE)
/* Odd columns have sums of their own where there are too few tokens to keep the multipliers busy. */
#define DECLARE_ODD(r) vi left_odd##r = vi_set(0), right_odd##r = vi_set(0);
        EACH(DECLARE_ODD, TILE)
#undef DECLARE_ODD
        for (int64_t chunk = length / 8; chunk > 0; chunk--, b += 4 * VQ_COLUMNS, a += 2 * tile) {
            const vi both0 = vi_load(b), both1 = vi_load(b + 4 * VW);
            const vi low0 = vi_and(both0, half), low1 = vi_and(both1, half);
#define EVEN(r) if (tile > r) { \
        const vi four = vi_set(a[r]); \
        left##r = vi_dot_small(left##r, low0, four), right##r = vi_dot_small(right##r, low1, four); \
    }
            EACH(EVEN, TILE)
#undef EVEN
            const vi high0 = vi_and(vi_shift_right(both0, 4), half), high1 = vi_and(vi_shift_right(both1, 4), half);
#define ODD(r) if (tile > r) { \
        const vi four = vi_set(a[tile + r]); \
        if (tile < 4) { \
            left_odd##r = vi_dot_small(left_odd##r, high0, four), right_odd##r = vi_dot_small(right_odd##r, high1, four); \
        } else { \
            left##r = vi_dot_small(left##r, high0, four), right##r = vi_dot_small(right##r, high1, four); \
        } \
    }
            EACH(ODD, TILE)
#undef ODD
        }
#define JOIN_ODD(r) if (tile > r && tile < 4) left##r = vi_add(left##r, left_odd##r), right##r = vi_add(right##r, right_odd##r);
        EACH(JOIN_ODD, TILE)
#undef JOIN_ODD
        EACH(ADD, TILE)
    }
}

/* 8 bits: a byte for each code. w [length / 4][32], four neighbours each. */
INLINE void tile_bytes(const vq_layer *layer, int64_t at, const int32_t *x, const uint8_t *w, int64_t length,
                       const int32_t *totals, int first, float *y, const int tile) {
    for (int pair = 0; pair < PAIRS; pair++) {
        const int32_t *a = x;
        const uint8_t *b = w + 4 * PAIR * pair;
        EACH(DECLARE, TILE)
        for (int64_t i = length / 4; i > 0; i--, a += tile, b += 4 * VQ_COLUMNS) {
            const vi w0 = vi_load(b), w1 = vi_load(b + 4 * VW);
#define ROW(r) if (tile > r) { \
        const vi four = vi_set(a[r]); \
        left##r = vi_dot(left##r, w0, four), right##r = vi_dot(right##r, w1, four); \
    }
            EACH(ROW, TILE)
#undef ROW
        }
        EACH(ADD, TILE)
    }
}
#undef DECLARE
#undef ADD

/* One slice of a block, for all tokens of the chunk. */
INLINE void slice_codes(const vq_layer *layer, const vq_packed *packed, int64_t at, int64_t column, const uint8_t *w,
                        int64_t length, const int32_t *totals, float *y, const int bits) {
    const int64_t columns = vq_groups(layer) * vq_padded(layer);
    const int start = column % vq_padded(layer) == 0;
    for (int64_t first = 0; first < packed->tokens; first += TILE) {
        const int64_t rest = packed->tokens - first;
        const int tile = rest < TILE ? (int)rest : TILE;
        const int32_t *x = packed->codes + (first * columns + column * tile) / 4, *of = totals + first;
        float *to = y + first * VQ_COLUMNS;
        switch (tile) {
#define CASE(r) case r + 1: \
            if (bits == 4) tile_nibbles(layer, at, x, w, length, of, start, to, r + 1); \
            else tile_bytes(layer, at, x, w, length, of, start, to, r + 1); \
            break;
            EACH(CASE, TILE)
#undef CASE
        }
    }
}
