/* From sums to results: the scale of each token, the bias, and the dtype of the activations. */

#ifdef VQ_BF16
#include "pairs.h"
#define PAIRED(call) ((call)->type == VQ_BFLOAT16)
#else
#define PAIRED(call) 0
#define slice_pairs slice_floats
#define pack_pairs(call, packed, token, m) (void)0
#endif

static float load_one(const void *p, int type, int64_t i) {
    float lanes[VW];
    uint16_t halves[VW] = {0};
    uint32_t bits;
    if (type == VQ_FLOAT32) return ((const float *)p)[i];
    halves[0] = ((const uint16_t *)p)[i];
    if (type == VQ_FLOAT16) {
        vf_store(lanes, vf_load_half(halves));
        return lanes[0];
    }
    bits = (uint32_t)halves[0] << 16;
    memcpy(lanes, &bits, sizeof bits);
    return lanes[0];
}

static uint16_t to_bfloat16(float x) { /* round half to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void write_block(const vq_call *call, const vq_packed *packed, int64_t block, float *sums) {
    const vq_layer *layer = call->layer;
    const int64_t n = layer->rows, first = block * VQ_COLUMNS;
    const int count = n - first < VQ_COLUMNS ? (int)(n - first) : VQ_COLUMNS;
    float bias[VQ_COLUMNS] = {0};
    for (int i = 0; i < count && call->bias; i++) bias[i] = load_one(call->bias, call->bias_type, first + i);
    for (int64_t m = 0; m < packed->tokens; m++) {
        const int64_t at = (packed->start + m) * n + first;
        float *y = sums + m * VQ_COLUMNS;
        const float scale = call->integer ? packed->scales[m] : 1.0f;
        for (int i = 0; i < VQ_COLUMNS; i++) y[i] = y[i] * scale + bias[i];
        if (call->type == VQ_FLOAT32) {
            memcpy((float *)call->y + at, y, (size_t)count * sizeof *y);
            continue;
        }
        uint16_t halves[VQ_COLUMNS];
        if (call->type == VQ_BFLOAT16) {
            for (int i = 0; i < VQ_COLUMNS; i++) halves[i] = to_bfloat16(y[i]);
        } else {
            for (int i = 0; i < VQ_COLUMNS; i += VW) vf_store_half(halves + i, vf_load(y + i));
        }
        memcpy((uint16_t *)call->y + at, halves, (size_t)count * sizeof *halves);
    }
}

static void FN(pack)(const vq_call *call, const vq_packed *packed, int64_t from, int64_t to, float *row) {
    for (int64_t m = from; m < to; m++) {
        if (call->integer) pack_codes(call, packed, packed->start + m, m, row);
        else if (PAIRED(call)) pack_pairs(call, packed, packed->start + m, m);
        else pack_floats(call, packed, packed->start + m, m, row);
    }
}

/* One block of 32 output features, for all tokens of the chunk. */
static void FN(block)(const vq_call *call, const vq_packed *packed, int64_t block) {
    const vq_layer *layer = call->layer;
    const int64_t groups = vq_groups(layer), padded = vq_padded(layer), bits = layer->bits;
    const int64_t step = vq_slice(layer, call->integer);
    float y[VQ_CHUNK * VQ_COLUMNS] __attribute__((aligned(64)));
    int64_t sums = 0; /* of the slice */
    memset(y, 0, (size_t)packed->tokens * VQ_COLUMNS * sizeof *y);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = (block * groups + g) * VQ_COLUMNS;
        for (int64_t start = 0; start < padded; start += step, sums += packed->tokens) {
            const int64_t length = start + step < padded ? step : padded - start, column = g * padded + start;
            const uint8_t *w = layer->weight + (at * padded + start * VQ_COLUMNS) * bits / 8;
            if (call->integer && bits == 4) slice_codes(layer, packed, at, column, w, length, packed->code_sums + sums, y, 4);
            else if (call->integer) slice_codes(layer, packed, at, column, w, length, packed->code_sums + sums, y, 8);
            else if (PAIRED(call) && bits == 4) slice_pairs(layer, packed, at, column, w, length, packed->float_sums + sums, y, 4);
            else if (PAIRED(call)) slice_pairs(layer, packed, at, column, w, length, packed->float_sums + sums, y, 8);
            else if (bits == 4) slice_floats(layer, packed, at, column, w, length, packed->float_sums + sums, y, 4);
            else slice_floats(layer, packed, at, column, w, length, packed->float_sums + sums, y, 8);
        }
    }
    write_block(call, packed, block, y);
}

const vq_isa FN(isa) = {FN(pack), FN(block)};
