/* Random calls of the native kernels, each compared with a product in double; for AddressSanitizer and UBSan.
 *
 *     cd vlaquant/kernels/native; cc -fsanitize=address,undefined -I . $(ls | grep c$) ../../../tests/native_fuzz.c -pthread -lm
 *     ./a.out CALLS SEED [INSTRUCTION_SET]
 *
 * Every buffer has exactly the size that the layout says, so that one value too far is an error. Some calls hold values
 * that are not finite; those must stay in their token. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"

extern const char *vq_set_name(int);
extern int vq_set_runs_here(int), vq_use(const char *);
extern void vq_set_parallel(void (*)(void (*)(void *), void *, unsigned, unsigned));
extern int vq_linear(const vq_layer *, const void *, int64_t, int64_t, int, const void *, int, void *, int, int);

static uint64_t state;
static uint32_t draw(uint32_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}
static float real(void) { return ((float)draw(2001) - 1000.0f) / 500.0f; }

typedef struct { void (*work)(void *); void *data; } job;
static void *start(void *data) { ((job *)data)->work(((job *)data)->data); return NULL; }
static void threads(void (*work)(void *), void *data, unsigned count, unsigned flags) {
    pthread_t other[8];
    job mine = {work, data};
    (void)flags;
    for (unsigned i = 1; i < count; i++) pthread_create(&other[i], NULL, start, &mine);
    work(data);
    for (unsigned i = 1; i < count; i++) pthread_join(other[i], NULL);
}

static void *get(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (p == NULL) exit(3);
    return p;
}

static uint16_t half_of(float x) { /* towards zero; of what this program draws, which is no subnormal */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7e00;
    if (isinf(x)) return (uint16_t)(bits >> 16 & 0x8000) | 0x7c00;
    return x == 0 ? 0 : (uint16_t)((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
}
static float of_half(uint16_t h) {
    if ((h & 0x7c00) == 0x7c00) return h & 0x3ff ? NAN : h & 0x8000 ? -INFINITY : INFINITY;
    float x = ldexpf((float)((h & 0x3ff) | (h & 0x7c00 ? 0x400 : 0)), (h >> 10 & 31 ? h >> 10 & 31 : 1) - 25);
    return h & 0x8000 ? -x : x;
}
static void put(void *to, int type, int64_t i, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (type == VQ_FLOAT32) ((float *)to)[i] = x;
    else if (type == VQ_BFLOAT16) ((uint16_t *)to)[i] = x != x ? 0x7fc0 : (uint16_t)(bits >> 16);
    else ((uint16_t *)to)[i] = half_of(x);
}
static float take(const void *from, int type, int64_t i) {
    uint32_t bits;
    float x;
    if (type == VQ_FLOAT32) return ((const float *)from)[i];
    if (type == VQ_FLOAT16) return of_half(((const uint16_t *)from)[i]);
    bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int one_call(void) {
    const int bits = draw(2) ? 4 : 8, integer = (int)draw(2), type = (int)draw(3), asymmetric = (int)draw(2);
    const int64_t n = 1 + draw(draw(4) ? 40 : 140), group = 1 + draw(draw(4) ? 40 : 600), groups = 1 + draw(3);
    const int64_t k = group * groups, tokens = 1 + draw(draw(8) ? 14 : 420), stride = k + draw(3);
    const int fixed = integer && draw(3) == 0, with_zero = fixed && draw(2), with_bias = (int)draw(2);
    const int64_t padded = (group + 7) / 8 * 8, blocks = (n + 31) / 32, scales = blocks * groups * 32;
    const int zero = 1 << (bits - 1), size = type == VQ_FLOAT32 ? 4 : 2;
    uint8_t *weight = get((size_t)(blocks * groups * padded * 4 * bits)), *codes = get((size_t)(n * k));
    float *scale = get((size_t)scales * 4), *shift = get((size_t)scales * 4);
    int32_t *offset = get((size_t)scales * 4), *sums = get((size_t)scales * 4);
    const size_t x_bytes = (size_t)((tokens - 1) * stride + k) * (size_t)size;
    void *x = get(x_bytes), *y = get((size_t)(tokens * n * size)), *bias = get((size_t)(n * size));
    vq_layer layer = {n, k, group, bits, weight, scale, asymmetric ? shift : NULL, asymmetric ? offset : NULL,
                      with_zero ? sums : NULL, fixed ? 0.02f : 0.0f, with_zero ? (int32_t)draw(255) - 127 : 0};
    memset(weight, bits == 4 ? 0x88 : 0x80, (size_t)(blocks * groups * padded * 4 * bits));
    for (int64_t i = 0; i < scales; i++) {
        const int z = asymmetric ? (int)draw(1u << bits) - zero : 0;
        const int real_row = i / (groups * 32) * 32 + i % 32 < n;
        scale[i] = real_row ? 0.001f * (1 + (float)draw(100)) : 0;
        offset[i] = z + zero, shift[i] = (float)z * scale[i], sums[i] = 0;
    }
    for (int64_t row = 0; row < n; row++) {
        for (int64_t column = 0; column < k; column++) {
            const int64_t g = column / group, p = column % group, at = (row / 32 * groups + g) * 32 + row % 32;
            const uint8_t u = (uint8_t)draw(1u << bits);
            codes[row * k + column] = u;
            sums[at] += u - offset[at];
            if (bits == 8) {
                weight[(((row / 32 * groups + g) * padded / 4 + p / 4) * 32 + row % 32) * 4 + p % 4] = u;
            } else {
                uint8_t *byte = weight + (((row / 32 * groups + g) * padded / 8 + p / 8) * 32 + row % 32) * 4 + p % 4;
                *byte = p % 8 < 4 ? (uint8_t)((*byte & 0xf0) | u) : (uint8_t)((*byte & 0x0f) | u << 4);
            }
        }
    }
    memset(x, 0, x_bytes);
    const int64_t bad = draw(10) ? -1 : (int64_t)draw((uint32_t)tokens);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < k; i++) put(x, type, t * stride + i, real());
        if (t == bad) put(x, type, t * stride + draw((uint32_t)k), draw(2) ? NAN : draw(2) ? INFINITY : -INFINITY);
    }
    for (int64_t i = 0; i < n; i++) put(bias, type, i, real());
    int wrong = vq_linear(&layer, x, tokens, stride, type, with_bias ? bias : NULL, type, y, 1 + (int)draw(3), integer);
    const double last_place = type == VQ_FLOAT32 ? 0 : type == VQ_BFLOAT16 ? 0x1p-8 : 0x1p-11;
    for (int64_t t = 0; t < tokens && !wrong; t++) {
        float largest = 0, input_scale = layer.input_scale;
        for (int64_t i = 0; i < k; i++) largest = fmaxf(largest, fabsf(take(x, type, t * stride + i)));
        if (!fixed) input_scale = fmaxf(largest / 127.0f, 0x1p-126f);
        for (int64_t row = 0; row < n; row += 1 + draw(7)) {
            double sum = with_bias ? take(bias, type, row) : 0, size_of = fabs(sum);
            for (int64_t i = 0; i < k; i++) {
                const int64_t at = (row / 32 * groups + i / group) * 32 + row % 32;
                double value = take(x, type, t * stride + i);
                if (integer) {
                    float code = rintf((float)value / input_scale + (float)layer.input_zero);
                    code = fminf(fmaxf(code, with_zero ? -128 : -127), 127);
                    value = ((double)code - layer.input_zero) * (double)input_scale;
                }
                value *= (double)scale[at];
                sum += value * (codes[row * k + i] - offset[at]);
                size_of += fabs(value) * 2 * zero; /* codes and zero points are multiplied apart, and at most so large */
            }
            const double got = take(y, type, t * n + row);
            if (t == bad) wrong |= isfinite(got);
            else wrong |= !(fabs(got - sum) <= 1e-5 * size_of + last_place * fabs(sum) + (type == VQ_FLOAT16 ? 1e-6 : 0));
            if (wrong) {
                printf("n %ld k %ld group %ld bits %d tokens %ld type %d integer %d asymmetric %d token %ld row %ld: "
                       "got %g, wanted %g\n", (long)n, (long)k, (long)group, bits, (long)tokens, type, integer, asymmetric,
                       (long)t, (long)row, got, sum);
                break;
            }
        }
    }
    free(weight), free(codes), free(scale), free(shift), free(offset), free(sums), free(x), free(y), free(bias);
    return wrong;
}

int main(int count, char **arguments) {
    const long calls = count > 1 ? atol(arguments[1]) : 1000;
    vq_set_parallel(threads);
    for (int i = 0; vq_set_name(i) != NULL; i++) {
        if (!vq_set_runs_here(i) || (count > 3 && strcmp(arguments[3], vq_set_name(i)) != 0)) continue;
        if (!vq_use(vq_set_name(i))) return 2;
        state = count > 2 ? (uint64_t)atol(arguments[2]) : 0;
        for (long call = 0; call < calls; call++) {
            if (one_call()) return 1;
        }
        printf("%s: %ld calls\n", vq_set_name(i), calls);
        fflush(stdout);
    }
    return 0;
}
