/* GELU in its tanh form, x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
 *
 * The formula is of arXiv:1606.08415, written with exp instead of tanh, which loses no digits where
 * tanh is close to -1. Nothing is fused, so that every instruction set gives the same bits.
 */
#include "kernel_utils.h"

enum { CHUNK = 1024 };

typedef struct {
    const void *x;
    void *y;
    int64_t count;
    int32_t dtype;
} Gelu;

/* Returns 2^t, with an error of 2 units in the last place; infinity from 128 on. */
ALWAYS_INLINE float compute_power(float t) {
    t = t < -126.0f ? -126.0f : t; /* NaN stays */
    t = t > 128.0f ? 128.0f : t;
    const float shifted = t + 0x1.8p23f, f = t - (shifted - 0x1.8p23f); /* t = whole number + f */
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (int32_t)((uint32_t)(bits + 127) << 23); /* the whole number as an exponent */
    float power;
    memcpy(&power, &bits, 4);
    /* The Taylor series of 2^f, of which the next term is below 2e-8 for |f| <= 0.5. */
    float sum = 1.540353039e-4f;
    sum = sum * f + 1.333355815e-3f;
    sum = sum * f + 9.618129108e-3f;
    sum = sum * f + 5.550410866e-2f;
    sum = sum * f + 2.402265070e-1f;
    sum = sum * f + 6.931471806e-1f;
    return (sum * f + 1.0f) * power;
}

ALWAYS_INLINE void compute_chunk(const Gelu *g, int64_t start, int64_t count) {
    float values[CHUNK];
    if (g->dtype == FLOAT32)
        memcpy(values, (const float *)g->x + start, (size_t)count * 4);
    else
        for (int64_t i = 0; i < count; i++) values[i] = read_bfloat16(((const uint16_t *)g->x)[start + i]);
    for (int64_t i = 0; i < count; i++) {
        const float x = values[i];
        /* -2 sqrt(2 / pi) log2(e) */
        values[i] = x / (1.0f + compute_power(-2.302208198f * (x + 0.044715f * x * x * x)));
    }
    if (g->dtype == FLOAT32)
        memcpy((float *)g->y + start, values, (size_t)count * 4);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)g->y)[start + i] = round_to_bfloat16(values[i]);
}

ALWAYS_INLINE void compute_chunks(const Gelu *g, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        const int64_t rest = g->count - i * CHUNK;
        compute_chunk(g, i * CHUNK, rest < CHUNK ? rest : CHUNK);
    }
}

/* The same code, vectorized for each instruction set by the compiler. */
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void compute_avx512(
    void *g, int64_t first, int64_t last) {
    compute_chunks(g, first, last);
}
__attribute__((target("avx2"))) static void compute_avx2(void *g, int64_t first, int64_t last) {
    compute_chunks(g, first, last);
}
#endif
static void compute_portable(void *g, int64_t first, int64_t last) { compute_chunks(g, first, last); }

/* Computes the GELU of `count` values. */
void fp4dit_gelu_tanh(const void *x, void *y, int64_t count, int dtype, int threads) {
    Gelu task = {x, y, count, dtype};
    void (*run)(void *, int64_t, int64_t) = compute_portable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        run = compute_avx512;
    else if (__builtin_cpu_supports("avx2"))
        run = compute_avx2;
#endif
    run_parallel(run, &task, (count + CHUNK - 1) / CHUNK, threads);
}
