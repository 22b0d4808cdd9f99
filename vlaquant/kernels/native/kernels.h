/* The kernels, written once for vectors of VW lanes and compiled for each instruction set: isa_*.c.
 *
 * A call goes through its tokens in chunks. Activations of a chunk are packed in tiles of a few tokens, so that the
 * innermost loops read memory in order; then each thread takes one block of 32 output features after the other.
 *
 * Letters: m tokens of a chunk, r token of a tile, g groups, p columns of a group (padded), h one of two vectors.
 */
#include <float.h>
#include <stddef.h>
#include <string.h>

#include "layer.h"

#define PAIR (2 * VW)           /* output features that the innermost loops compute at once */
#define PAIRS (VQ_COLUMNS / PAIR)

#define UNROLL _Pragma("GCC unroll 16")

/* ---- activations ------------------------------------------------------------------------------------------------ */

/* A row of k values as floats; `row` has room for a vector more. */
static void load_row(const vq_call *call, int64_t token, float *row) {
    const int64_t k = call->layer->columns, start = token * call->stride;
    int64_t i = 0;
    if (call->type == VQ_FLOAT32) {
        memcpy(row, (const float *)call->x + start, (size_t)k * sizeof *row);
        return;
    }
    const uint16_t *x = (const uint16_t *)call->x + start;
    if (call->type == VQ_BFLOAT16) {
        for (; i < k; i++) {
            uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(row + i, &bits, sizeof bits);
        }
        return;
    }
    for (; i + VW <= k; i += VW) vf_store(row + i, vf_load_half(x + i));
    if (i < k) {
        uint16_t rest[VW] = {0};
        memcpy(rest, x + i, (size_t)(k - i) * sizeof *x);
        vf_store(row + i, vf_load_half(rest));
    }
}

/* Float activations of one token: into its place of the tile, and the sum of each slice. */
static void pack_floats(const vq_call *call, const vq_packed *packed, int64_t token, int64_t m, float *row) {
    const vq_layer *layer = call->layer;
    const int64_t groups = vq_groups(layer), padded = vq_padded(layer), size = layer->group;
    const int64_t first = m / TILE * TILE, r = m - first;
    const int64_t tile = packed->tokens - first < TILE ? packed->tokens - first : TILE;
    float *to = packed->floats + first * groups * padded + r, *sums = packed->float_sums + m;
    load_row(call, token, row);
    for (int64_t g = 0; g < groups; g++, row += size) {
        for (int64_t start = 0; start < padded; start += VQ_SLICE, sums += packed->tokens) {
            const int64_t end = start + VQ_SLICE < padded ? start + VQ_SLICE : padded, last = end < size ? end : size;
            float sum = 0;
            for (int64_t i = start; i < last; i++, to += tile) *to = row[i];
            for (int64_t i = last; i < end; i++, to += tile) *to = 0;
            for (int64_t i = start; i < last && layer->shift; i++) sum += row[i];
            *sums = sum;
        }
    }
}

/* The scale of one token, or of all: max |x| / 127, as numerics.qparams computes it. NaN if a value is not finite. */
static float token_scale(const vq_call *call, const float *row) {
    const int64_t k = call->layer->columns;
    vf top = vf_set(0), bad = vf_set(0);
    int64_t i = 0;
    float largest = 0, spread[VW], nan = 0;
    for (; i + VW <= k; i += VW) {
        vf x = vf_load(row + i);
        top = vf_max(vf_abs(x), top);
        bad = vf_fma(x, vf_set(0), bad);
    }
    vf_store(spread, top);
    for (int lane = 0; lane < VW; lane++) largest = spread[lane] > largest ? spread[lane] : largest;
    vf_store(spread, bad);
    for (int lane = 0; lane < VW; lane++) nan += spread[lane];
    for (; i < k; i++) {
        const float x = row[i] < 0 ? -row[i] : row[i];
        largest = x > largest ? x : largest;
        nan += x * 0.0f;
    }
    if (nan != 0.0f) return nan;
    if (call->layer->input_scale > 0) return call->layer->input_scale;
    largest /= 127.0f;
    return largest < FLT_MIN ? FLT_MIN : largest;
}

/* Codes of a row: clamp(round(x / scale + zero)), half to even. Both buffers have room for a vector more. */
static void to_codes(const vq_layer *layer, const float *row, float scale, int8_t *codes) {
    const vf divisor = vf_set(scale), zero = vf_set((float)layer->input_zero);
    const vf low = vf_set(layer->sums ? -128 : -127), high = vf_set(127);
    for (int64_t i = 0; i < layer->columns; i += VW) {
        vf x = vf_div(vf_load(row + i), divisor);
        if (layer->sums) x = vf_add(x, zero);
        vi_store_bytes(codes + i, vi_round(vf_min(vf_max(x, low), high)));
    }
}

/* Rounded activations of one token: four neighbours in an int32, its scale, and the sum of each slice. */
static void pack_codes(const vq_call *call, const vq_packed *packed, int64_t token, int64_t m, float *row) {
    const vq_layer *layer = call->layer;
    const int64_t groups = vq_groups(layer), padded = vq_padded(layer), size = layer->group;
    const int64_t slice = vq_slice(layer, 1), first = m / TILE * TILE, r = m - first;
    const int64_t tile = packed->tokens - first < TILE ? packed->tokens - first : TILE;
    int32_t *to = packed->codes + first * groups * padded / 4 + r, *sums = packed->code_sums + m;
    int8_t *codes = (int8_t *)(row + layer->columns + VW);
    load_row(call, token, row);
    for (int64_t i = layer->columns; i < layer->columns + VW; i++) row[i] = 0;
    const float scale = token_scale(call, row);
    packed->scales[m] = scale;
    to_codes(layer, row, scale == scale ? scale : 1.0f, codes);
    for (int64_t g = 0; g < groups; g++, codes += size) {
        for (int64_t start = 0; start < padded; start += slice, sums += packed->tokens) {
            const int64_t end = start + slice < padded ? start + slice : padded, last = end < size ? end : size;
            int32_t sum = 0;
            int64_t i = start;
            for (; i + 4 <= last; i += 4, to += tile) memcpy(to, codes + i, 4);
            for (; i < end; i += 4, to += tile) {
                *to = 0;
                memcpy(to, codes + i, i < last ? (size_t)(last - i) : 0);
            }
            for (i = start; i < last; i++) sum += codes[i];
            *sums = sum;
        }
    }
}

/* ---- float activations ------------------------------------------------------------------------------------------ */

/* Column j of 8, of one vector of output features, as u - 2^(bits-1); `low` and `high` are the first and last four. */
#define UNPACK(bits, low, high, j) \
    ((bits) == 4 ? vf_nibble(low, 8 * ((j) % 4) + (j) / 4 * 4) : vf_byte((j) < 4 ? low : high, (j) % 4))

/* y += scale * sum - shift * total, for one vector of output features. */
INLINE void add_floats(const vq_layer *layer, int64_t at, vf sum, float total, float *y) {
    vf result = vf_fma(sum, vf_load(layer->scale + at), vf_load(y));
    if (layer->shift) result = vf_fma(vf_load(layer->shift + at), vf_set(-total), result);
    vf_store(y, result);
}

/* Few tokens: codes go from memory through registers into products. x [length][tile], w as in layer.h, y [tile][32]. */
INLINE void few_floats(const vq_layer *layer, int64_t at, const float *x, const uint8_t *w, int64_t length,
                       const float *totals, float *y, const int tile, const int bits) {
    for (int pair = 0; pair < PAIRS; pair++) {
        const float *a = x;
        const uint8_t *b = w + 4 * PAIR * pair;
#define DECLARE(r) vf left##r = vf_set(0), right##r = vf_set(0), left_odd##r = vf_set(0), right_odd##r = vf_set(0);
        EACH(DECLARE, FEW)
#undef DECLARE
        for (int64_t chunk = length / 8; chunk > 0; chunk--, b += 32 * bits, a += 8 * tile) {
            const vi low0 = vi_load(b), low1 = vi_load(b + 4 * VW);
            const vi high0 = bits == 8 ? vi_load(b + 4 * VQ_COLUMNS) : low0;
            const vi high1 = bits == 8 ? vi_load(b + 4 * (VQ_COLUMNS + VW)) : low1;
            vf w0, w1;
/* Odd columns have sums of their own where there are too few tokens to keep the multipliers busy. */
#define ROW_EVEN(r) if (tile > r) left##r = vf_fma(w0, vf_set(c[r]), left##r), right##r = vf_fma(w1, vf_set(c[r]), right##r);
#define ROW_ODD(r) if (tile > r && tile < 4) { \
        left_odd##r = vf_fma(w0, vf_set(c[r]), left_odd##r), right_odd##r = vf_fma(w1, vf_set(c[r]), right_odd##r); \
    } else ROW_EVEN(r)
#define COLUMN(j, ROW) { \
        const float *c = a + (j) * tile; \
        w0 = UNPACK(bits, low0, high0, j), w1 = UNPACK(bits, low1, high1, j); \
        EACH(ROW, FEW) \
    }
            COLUMN(0, ROW_EVEN) COLUMN(1, ROW_ODD) COLUMN(2, ROW_EVEN) COLUMN(3, ROW_ODD)
            COLUMN(4, ROW_EVEN) COLUMN(5, ROW_ODD) COLUMN(6, ROW_EVEN) COLUMN(7, ROW_ODD)
#undef ROW_EVEN
#undef ROW_ODD
#undef COLUMN
        }
#define ADD(r) if (tile > r) { \
        float *to = y + r * VQ_COLUMNS + PAIR * pair; \
        add_floats(layer, at + PAIR * pair, vf_add(left##r, left_odd##r), totals[r], to); \
        add_floats(layer, at + PAIR * pair + VW, vf_add(right##r, right_odd##r), totals[r], to + VW); \
    }
        EACH(ADD, FEW)
#undef ADD
    }
}

/* `length` columns of 32 output features, unpacked: to [length][32]. */
INLINE void unpack_floats(const uint8_t *w, int64_t length, float *to, const int bits) {
    for (int64_t chunk = 0; chunk < length / 8; chunk++, w += 32 * bits, to += 8 * VQ_COLUMNS) {
        UNROLL for (int vector = 0; vector < VQ_COLUMNS / VW; vector++) {
            const vi low = vi_load(w + 4 * VW * vector);
            const vi high = bits == 8 ? vi_load(w + 4 * (VQ_COLUMNS + VW * vector)) : low;
#define COLUMN(j) vf_store(to + (j) * VQ_COLUMNS + VW * vector, UNPACK(bits, low, high, j));
            EACH_8(COLUMN)
#undef COLUMN
        }
    }
}

/* As few_floats, with unpacked weights w [length][32]. */
INLINE void tile_floats(const vq_layer *layer, int64_t at, const float *x, const float *w, int64_t length,
                        const float *totals, float *y, const int tile) {
    for (int pair = 0; pair < PAIRS; pair++) {
        const float *a = x, *b = w + PAIR * pair;
#define DECLARE(r) vf left##r = vf_set(0), right##r = vf_set(0);
        EACH(DECLARE, TILE)
#undef DECLARE
        for (int64_t i = 0; i < length; i++, a += tile, b += VQ_COLUMNS) {
            const vf w0 = vf_load(b), w1 = vf_load(b + VW);
#define ROW(r) if (tile > r) { \
        const vf value = vf_set(a[r]); \
        left##r = vf_fma(w0, value, left##r), right##r = vf_fma(w1, value, right##r); \
    }
            EACH(ROW, TILE)
#undef ROW
        }
#define ADD(r) if (tile > r) { \
        float *to = y + r * VQ_COLUMNS + PAIR * pair; \
        add_floats(layer, at + PAIR * pair, left##r, totals[r], to); \
        add_floats(layer, at + PAIR * pair + VW, right##r, totals[r], to + VW); \
    }
        EACH(ADD, TILE)
#undef ADD
    }
}

/* One slice of a block, for all tokens of the chunk. */
INLINE void slice_floats(const vq_layer *layer, const vq_packed *packed, int64_t at, int64_t column, const uint8_t *codes,
                         int64_t length, const float *totals, float *y, const int bits) {
    const int64_t columns = vq_groups(layer) * vq_padded(layer);
    float w[VQ_SLICE * VQ_COLUMNS] __attribute__((aligned(64)));
    if (packed->tokens > FEW) unpack_floats(codes, length, w, bits);
    for (int64_t first = 0; first < packed->tokens; first += TILE) {
        const int64_t rest = packed->tokens - first;
        const int tile = rest < TILE ? (int)rest : TILE;
        const float *x = packed->floats + first * columns + column * tile;
        float *to = y + first * VQ_COLUMNS;
        if (packed->tokens <= FEW) {
            switch (tile) {
#define CASE(r) case r + 1: few_floats(layer, at, x, codes, length, totals, to, r + 1, bits); break;
                EACH(CASE, FEW)
#undef CASE
            }
        } else {
            switch (tile) {
#define CASE(r) case r + 1: tile_floats(layer, at, x, w, length, totals + first, to, r + 1); break;
                EACH(CASE, TILE)
#undef CASE
            }
        }
    }
}
