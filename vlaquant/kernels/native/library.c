/* The library: which instruction set, how many threads, and the loop over chunks of tokens. */
#include <stdlib.h>
#include <string.h>

#include "packed.h"

#define EXPORT __attribute__((visibility("default")))

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

/* ---- instruction sets, the fastest first ------------------------------------------------------------------------ */

#define DECLARE(name) extern const vq_isa vq_isa_##name;
#if defined(__x86_64__)
DECLARE(avx512bf16)
DECLARE(avx512vnni)
DECLARE(avx512)
DECLARE(avx2)
#elif defined(__aarch64__)
DECLARE(neon_dot)
#endif
DECLARE(portable)

static int always(void) { return 1; }
#if defined(__x86_64__)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static int has_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static int has_bf16(void) { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
static int has_dot(void) {
#if defined(__APPLE__)
    return 1; /* all of Apple's 64-bit desktop CPUs */
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#else
    return 0;
#endif
}
#endif

static const struct {
    const char *name;
    int (*here)(void);
    const vq_isa *isa;
} SETS[] = {
#if defined(__x86_64__)
    {"avx512bf16", has_bf16, &vq_isa_avx512bf16},
    {"avx512vnni", has_vnni, &vq_isa_avx512vnni},
    {"avx512", has_avx512, &vq_isa_avx512},
    {"avx2", has_avx2, &vq_isa_avx2},
#elif defined(__aarch64__)
    {"neon_dot", has_dot, &vq_isa_neon_dot},
#endif
    {"portable", always, &vq_isa_portable},
};
enum { COUNT = sizeof SETS / sizeof *SETS };

static const vq_isa *chosen;

EXPORT int vq_abi(void) { return VQ_ABI; }

/* Name of an instruction set that was compiled, or NULL after the last. */
EXPORT const char *vq_set_name(int i) { return i >= 0 && i < COUNT ? SETS[i].name : NULL; }

EXPORT int vq_set_runs_here(int i) { return i >= 0 && i < COUNT && SETS[i].here(); }

/* Use one by its name; returns 0 if there is none of that name, or the CPU lacks it. Not while a call runs. */
EXPORT int vq_use(const char *name) {
    for (int i = 0; i < COUNT; i++) {
        if (strcmp(SETS[i].name, name) == 0 && SETS[i].here()) {
            chosen = SETS[i].isa;
            return 1;
        }
    }
    return 0;
}

/* ---- threads: those of the OpenMP runtime that torch has loaded ------------------------------------------------- */

typedef void (*vq_parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
static vq_parallel parallel;

/* GOMP_parallel of that runtime, or NULL for one thread. */
EXPORT void vq_set_parallel(vq_parallel function) { parallel = function; }

typedef struct {
    const vq_call *call;
    const vq_packed *packed;
    float *rows;             /* scratch of each thread */
    int64_t row_floats, next, worker;
    int packing;
} vq_job;

static void work(void *data) {
    vq_job *job = data;
    const int64_t worker = __atomic_fetch_add(&job->worker, 1, __ATOMIC_RELAXED);
    const int64_t step = job->packing ? VQ_TILES : 1;
    const int64_t count = job->packing ? job->packed->tokens : vq_blocks(job->call->layer);
    for (;;) {
        const int64_t i = __atomic_fetch_add(&job->next, step, __ATOMIC_RELAXED), end = i + step < count ? i + step : count;
        if (i >= count) return;
        if (job->packing) chosen->pack(job->call, job->packed, i, end, job->rows + worker * job->row_floats);
        else chosen->block(job->call, job->packed, i);
    }
}

static void run(vq_job *job, int packing, int threads) {
    job->packing = packing;
    job->next = job->worker = 0;
    if (threads > 1 && parallel) parallel(work, job, (unsigned)threads, 0);
    else work(job);
}

/* ---- a call ----------------------------------------------------------------------------------------------------- */

/* Below so many products a second thread costs more than it gives. */
#define WORTH_A_THREAD (1 << 18)

static int64_t aligned(int64_t count) { return (count + 15) / 16 * 16; }

static int linear(const vq_call *call) {
    const vq_layer *layer = call->layer;
    const int64_t columns = vq_groups(layer) * vq_padded(layer), largest = call->tokens < VQ_CHUNK ? call->tokens : VQ_CHUNK;
    const int64_t slices = vq_groups(layer) * ((vq_padded(layer) + VQ_SLICE - 1) / VQ_SLICE);
    const int64_t products = layer->rows * layer->columns * largest;
    int threads = products / WORTH_A_THREAD + 1 < call->threads ? (int)(products / WORTH_A_THREAD + 1) : call->threads;
    threads = threads < 1 || !parallel ? 1 : threads;
    const int packers = largest * layer->columns > WORTH_A_THREAD / 4 ? threads : 1;
    const int64_t row = aligned(layer->columns + layer->columns / 4 + 64);
    const int64_t values = call->integer ? aligned(columns * largest / 4) : aligned(columns * largest);
    const int64_t sums = aligned(slices * largest), scales = aligned(largest);
    char *memory = aligned_alloc(64, (size_t)(values + sums + scales + row * packers) * sizeof(float));
    if (memory == NULL) return VQ_NO_MEMORY;
    float *at = (float *)memory;
    vq_packed packed = {
        .floats = at, .codes = (int32_t *)at, .float_sums = at + values, .code_sums = (int32_t *)(at + values),
        .scales = at + values + sums,
    };
    vq_job job = {.call = call, .packed = &packed, .rows = at + values + sums + scales, .row_floats = row};
    for (int64_t start = 0; start < call->tokens; start += VQ_CHUNK) {
        packed.start = start;
        packed.tokens = call->tokens - start < VQ_CHUNK ? call->tokens - start : VQ_CHUNK;
        run(&job, 1, packers);
        run(&job, 0, threads);
    }
    free(memory);
    return VQ_DONE;
}

/* y = x times the weight, plus the bias; see vq_call. Returns VQ_DONE or VQ_NO_MEMORY. */
EXPORT int vq_linear(const vq_layer *layer, const void *x, int64_t tokens, int64_t stride, int type, const void *bias,
              int bias_type, void *y, int threads, int integer) {
    const vq_call call = {layer, x, tokens, stride, type, bias_type, bias, y, threads, integer};
    return linear(&call);
}

__attribute__((constructor)) static void choose(void) {
    for (int i = COUNT - 1; i >= 0; i--) {
        if (SETS[i].here()) chosen = SETS[i].isa;
    }
}
