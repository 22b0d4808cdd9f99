/* Activations of one chunk of tokens, packed; and what an instruction set offers. */
#ifndef VQ_PACKED_H
#define VQ_PACKED_H

#include "layer.h"

/* Tokens that are computed at once. Their sums for a block of output features stay in the first- or second-level cache. */
#define VQ_CHUNK 192

/* A multiple of the tokens of a tile on every CPU: threads pack so many at a time. */
#define VQ_TILES 24

typedef struct {
    int64_t start, tokens;   /* of the chunk */
    float *floats;           /* tiles: [columns, padded][tokens of the tile] */
    float *float_sums;       /* [slices][tokens] */
    int32_t *codes;          /* tiles: [columns, padded, / 4][tokens of the tile], four neighbours each */
    int32_t *code_sums;      /* [slices][tokens] */
    float *scales;           /* [tokens] */
} vq_packed;

typedef struct {
    /* Activations of tokens [from, to) of the chunk; `row` is scratch, see vq_row_bytes. */
    void (*pack)(const vq_call *, const vq_packed *, int64_t from, int64_t to, float *row);
    /* One block of output features. */
    void (*block)(const vq_call *, const vq_packed *, int64_t block);
} vq_isa;

/* Sums live in variables of their own, not in arrays: compilers keep only the former in registers throughout a loop.
 * EACH(DO, rows) is DO(0) DO(1) ... for as many as there are in the largest tile. */
#define EACH_4(DO) DO(0) DO(1) DO(2) DO(3)
#define EACH_6(DO) EACH_4(DO) DO(4) DO(5)
#define EACH_8(DO) EACH_6(DO) DO(6) DO(7)
#define EACH_12(DO) EACH_8(DO) DO(8) DO(9) DO(10) DO(11)
#define EACH(DO, rows) JOIN(EACH, rows)(DO)

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(vq_##name, VQ_ISA)

#endif
