/* What the kernels are given. The Python side writes the same fields: library.py. */
#ifndef VQ_LAYER_H
#define VQ_LAYER_H

#include <stdint.h>

#define VQ_ABI 2

/* Output features come in blocks of so many, in every layout and on every CPU. */
#define VQ_COLUMNS 32

/* Groups are padded to a multiple of so many input features; activations there are 0. */
#define VQ_PAD 8

/* Columns that are unpacked at once, into the first-level cache. */
#define VQ_SLICE 256

enum { VQ_FLOAT32 = 0, VQ_BFLOAT16 = 1, VQ_FLOAT16 = 2 };
enum { VQ_DONE = 0, VQ_NO_MEMORY = 1 };

/* A weight as the kernels read it. Letters: n out, k in, g groups, b = ceil(n / 32), p = a group, padded.
 *
 *   code     unsigned: u = q + 2^(bits-1)
 *   bits 4   weight [b][g][p/8][32] int32: lane i holds 8 codes of row 32b + i. Byte j has code j in its low half and
 *            code j + 4 in its high half, so that `& 0x0f0f0f0f` gives 4 neighbours as bytes, ready for an int8 dot
 *            product, and a shift by 4 the next 4.
 *   bits 8   weight [b][g][p/4][32] int32: lane i holds 4 neighbouring codes of row 32b + i, one a byte.
 *
 * Rows beyond n have scale 0. */
typedef struct {
    int64_t rows;            /* n */
    int64_t columns;         /* k */
    int64_t group;           /* input features that share a scale; k if all do */
    int64_t bits;            /* 4 or 8 */
    const uint8_t *weight;   /* as above */
    const float *scale;      /* [b][g][32] */
    const float *shift;      /* [b][g][32] zero * scale, for float activations; NULL if symmetric */
    const int32_t *offset;   /* [b][g][32] zero + 2^(bits-1), for int8 activations; NULL if symmetric */
    const int32_t *sums;     /* [b][g][32] sum of q - zero, for static activations with a zero point, or NULL */
    float input_scale;       /* of static activations; 0 if each token has its own */
    int32_t input_zero;
} vq_layer;

/* Activations and results of one call. */
typedef struct {
    const vq_layer *layer;
    const void *x;           /* [tokens][k], rows `stride` values apart */
    int64_t tokens, stride;
    int32_t type;            /* of x and y */
    int32_t bias_type;
    const void *bias;        /* [n] or NULL */
    void *y;                 /* [tokens][n] */
    int32_t threads;
    int32_t integer;         /* 1: activations are rounded to int8 */
} vq_call;

static inline int64_t vq_groups(const vq_layer *layer) { return layer->columns / layer->group; }
static inline int64_t vq_padded(const vq_layer *layer) { return (layer->group + VQ_PAD - 1) / VQ_PAD * VQ_PAD; }
/* Columns that are computed at once. Sums of 8-bit products are exact for a whole group, so there it is one slice. */
static inline int64_t vq_slice(const vq_layer *layer, int integer) {
    return integer && layer->bits == 8 ? vq_padded(layer) : VQ_SLICE;
}
static inline int64_t vq_blocks(const vq_layer *layer) { return (layer->rows + VQ_COLUMNS - 1) / VQ_COLUMNS; }

#endif
