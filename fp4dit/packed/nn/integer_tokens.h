/* Quantization of tokens to whole numbers or to values: formats, scales, and rounding.
 *
 * integer_kernels.c includes it. Loops over the values of short blocks are vectorized by the compiler.
 */
#define CHUNK 4096 /* values that are quantized at a time */

/* A number format whose step doubles with every binade from `floor` on. */
typedef struct {
    float floor, shift; /* shift times a binade is a number whose own last bit is the step there */
    float smallest;     /* positive value */
    float largest, least;
} Format;

enum {
    GIVEN,     /* scales, and zero points, are given */
    ABSMAX,    /* absmax / the largest value, in the scales' format if there is one */
    E8M0_EVEN, /* the power of two of a block as OCP aligns it, after rounding absmax */
    NVFP4      /* the best of some scales in the scales' format, times the scale of the tensor */
};

/* A number format, and where the scales come from. */
typedef struct {
    Format format;
    int32_t dtype; /* of x */
    int32_t rule;
    const float *scale; /* given: a number for each block, for each group, or one */
    const float *zero;  /* given: what is added before rounding; or NULL */
    int64_t scale_stride; /* 0: one scale, and zero point, for all */
    Format scales;      /* shift = 0: fp32 */
    float tensor_scale; /* of NVFP4 */
    int32_t num_ratios; /* of NVFP4: what the ideal scale is multiplied by to try others */
    const float *ratios;
    uint8_t *undecided; /* of NVFP4: whether sums of errors in another order may choose otherwise */
} Rounding;

typedef struct {
    const Rounding *rounding;
    const void *x;
    Tokens *tokens; /* the result in whole numbers, */
    void *values;   /* or, dequantized, in the type of x */
    int64_t blocks, group;
    int32_t failed;
} Quantization;

/* Rounds to the grid of a format, without a limit to its range.
 *
 * Adding and then subtracting a number whose own last bit is the step rounds to that step. */
ALWAYS_INLINE float round_to_grid(const Format *format, float value) {
    int32_t bits;
    float binade;
    memcpy(&bits, &value, 4);
    bits &= 0x7f800000;
    memcpy(&binade, &bits, 4);
    const float large = (binade > format->floor ? binade : format->floor) * format->shift;
    return (value + large) - large;
}

ALWAYS_INLINE float clamp(float value, float least, float largest) {
    value = value < least ? least : value; /* NaN stays */
    return value > largest ? largest : value;
}

ALWAYS_INLINE float round_scale(const Format *format, float scale) {
    if (format->shift == 0.0f) return scale < format->least ? format->least : scale;
    scale = scale > format->largest ? format->largest : scale;
    scale = round_to_grid(format, scale);
    return scale < format->least ? format->least : scale;
}

ALWAYS_INLINE float find_absmax(const float *x, int64_t count) {
    int32_t top = 0; /* magnitudes are compared as integers, so that NaN is the largest */
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float absmax;
    memcpy(&absmax, &top, 4);
    return absmax;
}

/* The exponent of absmax, rounded to the format's mantissa, less that of the largest value. */
ALWAYS_INLINE float find_power_of_two(const Format *format, float absmax) {
    if (absmax == 0.0f) return 1.0f;
    if (!(absmax <= 3.40282347e+38f)) return NAN;
    int exponent, top;
    const float mantissa = frexpf(absmax, &exponent);
    frexpf(format->largest, &top);
    exponent += (mantissa >= 1.0f - format->smallest / format->floor / 4) - top;
    return ldexpf(1.0f, exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
}

/* What values are divided by. */
typedef struct {
    float scale, inverse;
    int is_inverted; /* whether to divide by means of the inverse */
} Divisor;

/* Largest magnitude, and largest and least scale, for which no step of a division overflows or is
 * subnormal unless the quotient is next to 0. */
#define SAFE 0x1p60f

ALWAYS_INLINE Divisor make_divisor(float scale, float inverse, int is_safe) {
    return (Divisor){scale, inverse, is_safe && scale >= 1.0f / SAFE && scale <= SAFE};
}

/* Returns x / scale, correctly rounded, in a fourth of the time of a division.
 *
 * The first step brings the quotient within one unit in the last place. The second rounds it
 * correctly, because the inverse is (Markstein, IBM J. Res. Dev. 34(1), 1990, theorem 8.1). */
ALWAYS_INLINE float divide_by_inverse(float x, Divisor by) {
    float quotient = x * by.inverse;
    quotient = __builtin_fmaf(__builtin_fmaf(-by.scale, quotient, x), by.inverse, quotient);
    return __builtin_fmaf(__builtin_fmaf(-by.scale, quotient, x), by.inverse, quotient);
}

ALWAYS_INLINE float square_error(const Format *format, float x, float quotient, float scale) {
    const float value = clamp(quotient, format->least, format->largest);
    const float error = round_to_grid(format, value) * scale - x;
    return error * error;
}

/* The arrays that the scales of some blocks are chosen with: a number for each. */
typedef struct {
    float *scale, *inverse, *ideal, *candidate, *error, *least;
    int32_t *is_close;
} Scratch;

#define SIDE 8  /* blocks whose sums are computed together */
#define SHORT 16 /* values of a block */
typedef float vfloat8s __attribute__((vector_size(32), aligned(4), may_alias));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t vindex8 __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vindex8){__VA_ARGS__})
#endif

/* Adds neighbors of each half of two vectors. */
#define ADD_NEIGHBORS(a, b) \
    (SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15))

/* Sums up SIDE blocks of SHORT values, neighbors first: four additions of vectors that hold the
 * first or the last sums of several blocks. */
ALWAYS_INLINE void sum_short_blocks(const float *x, float *sums) {
    vfloat8s two[SIDE], four[SIDE / 2], eight[SIDE / 4];
    for (int b = 0; b < SIDE; b++) {
        const vfloat8s *block = (const vfloat8s *)(x + SHORT * b);
        two[b] = ADD_NEIGHBORS(block[0], block[1]);
    }
    for (int i = 0; i < SIDE / 2; i++) four[i] = ADD_NEIGHBORS(two[2 * i], two[2 * i + 1]);
    for (int i = 0; i < SIDE / 4; i++) {
        const vfloat8s a = four[2 * i], b = four[2 * i + 1];
        eight[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    const vfloat8s all = ADD_NEIGHBORS(eight[0], eight[1]);
    *(vfloat8s *)sums = SHUFFLE(all, all, 0, 1, 4, 5, 2, 3, 6, 7);
}

/* Sums up blocks: neighbors are added until there is one sum, or an odd number. Overwrites x. */
ALWAYS_INLINE void sum_blocks(float *x, int64_t blocks, int64_t count, float *sums) {
    if (blocks == SIDE && count == SHORT) {
        sum_short_blocks(x, sums);
        return;
    }
    int64_t width = count;
    for (; width % 2 == 0; width /= 2)
        for (int64_t i = 0; i < blocks * width / 2; i++) x[i] = x[2 * i] + x[2 * i + 1];
    for (int64_t b = 0; b < blocks; b++) {
        sums[b] = x[b * width];
        for (int64_t i = 1; i < width; i++) sums[b] += x[b * width + i];
    }
}

/* Computes for each block the sum of its values' squared errors with the candidate scale. `squares`
 * holds those of SIDE blocks. */
ALWAYS_INLINE void sum_squared_errors(const Rounding *r, const float *x, int64_t blocks, int64_t count,
                                      const Scratch *s, float *squares, int is_safe) {
    const Format format = r->format;
    for (int64_t b = 0; b < blocks; b++) s->inverse[b] = 1.0f / s->candidate[b];
    for (int64_t first = 0; first < blocks; first += SIDE) {
        const int64_t side = blocks - first < SIDE ? blocks - first : SIDE;
        for (int64_t b = 0; b < side; b++) {
            const Divisor by = make_divisor(s->candidate[first + b], s->inverse[first + b], is_safe);
            const float *block = x + (first + b) * count;
            float *square = squares + b * count;
            if (by.is_inverted)
                for (int64_t i = 0; i < count; i++)
                    square[i] = square_error(&format, block[i], divide_by_inverse(block[i], by), by.scale);
            else
                for (int64_t i = 0; i < count; i++)
                    square[i] = square_error(&format, block[i], block[i] / by.scale, by.scale);
        }
        sum_blocks(squares, side, count, s->error + first);
    }
}

/* Each step is a loop over all blocks, because the steps of one block wait for each other. */
ALWAYS_INLINE void choose_best_scales(const Rounding *r, const float *x, int64_t blocks, int64_t count,
                                      const Scratch *s, float *squares, uint8_t *undecided,
                                      int is_safe) {
    for (int64_t b = 0; b < blocks; b++) s->ideal[b] = s->scale[b] / r->format.largest / r->tensor_scale;
    for (int i = 0; i < r->num_ratios; i++) {
        for (int64_t b = 0; b < blocks; b++)
            s->candidate[b] = round_scale(&r->scales, r->ratios[i] * s->ideal[b]) * r->tensor_scale;
        if (r->num_ratios > 1) sum_squared_errors(r, x, blocks, count, s, squares, is_safe);
        if (i == 0) {
            memcpy(s->scale, s->candidate, (size_t)blocks * 4);
            memcpy(s->least, s->error, (size_t)blocks * 4);
            memset(s->is_close, 0, (size_t)blocks * 4);
            continue;
        }
        float *scale = s->scale, *least = s->least;
        const float *candidate = s->candidate, *error = s->error;
        int32_t *is_close = s->is_close;
#pragma omp simd
        for (int64_t b = 0; b < blocks; b++) {
            const int32_t is_better = error[b] < least[b];
            const float difference = fabsf(error[b] - least[b]);
            /* Each of both sums may differ by count 2^-24 of itself, here and in another order. */
            const int32_t is_far = difference > 2.4e-7f * (float)count * least[b];
            is_close[b] |= !is_far & (candidate[b] != scale[b]);
            scale[b] = is_better ? candidate[b] : scale[b];
            least[b] = is_better ? error[b] : least[b];
        }
    }
    for (int64_t b = 0; undecided && b < blocks; b++) undecided[b] = (uint8_t)s->is_close[b];
}

/* Chooses the scale of each block. Returns whether the values are safe to divide by the
 * inverse of a scale, which takes fused operations (`has_fma`). */
ALWAYS_INLINE int choose_scales(const Rounding *r, const float *x, int64_t blocks, int64_t count,
                                const Scratch *s, float *squares, uint8_t *undecided, int has_fma) {
    int is_safe = has_fma;
    for (int64_t b = 0; b < blocks; b++) s->scale[b] = find_absmax(x + b * count, count);
    for (int64_t b = 0; b < blocks; b++) is_safe &= s->scale[b] <= SAFE;
    if (r->rule == ABSMAX)
        for (int64_t b = 0; b < blocks; b++)
            s->scale[b] = round_scale(&r->scales, s->scale[b] / r->format.largest);
    else if (r->rule == E8M0_EVEN)
        for (int64_t b = 0; b < blocks; b++) s->scale[b] = find_power_of_two(&r->format, s->scale[b]);
    else
        choose_best_scales(r, x, blocks, count, s, squares, undecided, is_safe);
    return is_safe;
}

/* Quantizes a block in place to the grid of the format. Returns whether all values are numbers. */
ALWAYS_INLINE int round_block(const Format *format, float *x, int64_t count, Divisor by, float add) {
    const Format copy = *format; /* no store to x can change a copy */
    int32_t invalid = 0;
    if (by.is_inverted) {
        for (int64_t i = 0; i < count; i++)
            x[i] = round_to_grid(&copy, clamp(divide_by_inverse(x[i], by), copy.least, copy.largest));
        return 1;
    }
    for (int64_t i = 0; i < count; i++) {
        const float value = x[i] / by.scale + add;
        invalid |= value != value;
        x[i] = round_to_grid(&copy, clamp(value, copy.least, copy.largest));
    }
    return !invalid;
}

ALWAYS_INLINE void store_numbers(const Quantization *q, int64_t first, const float *grid, int64_t count) {
    Tokens *t = q->tokens;
    const float unit = 1.0f / q->rounding->format.smallest;
    const int32_t offset = t->offset;
    uint8_t *out = t->numbers + first;
    for (int plane = 0; plane < t->planes; plane++, out += q->blocks * q->group) {
        const int shift = 8 * (t->planes - 1 - plane);
        for (int64_t i = 0; i < count; i++)
            out[i] = (uint8_t)(((int32_t)(grid[i] * unit) + offset) >> shift);
    }
}

/* Quantizes blocks in place to the grid of the format, and writes the scale of each. */
ALWAYS_INLINE void round_blocks(const Quantization *q, int64_t first, int64_t blocks, float *x,
                                int64_t count, const Scratch *s, float *squares, int has_fma) {
    const Rounding *r = q->rounding;
    uint8_t *undecided = r->undecided ? r->undecided + first : NULL;
    int is_safe = 0;
    if (r->rule == GIVEN)
        for (int64_t b = 0; b < blocks; b++) s->scale[b] = r->scale[(first + b) * r->scale_stride];
    else
        is_safe = choose_scales(r, x, blocks, count, s, squares, undecided, has_fma);
    for (int64_t b = 0; b < blocks; b++) s->inverse[b] = 1.0f / s->scale[b];
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t place = (first + b) * r->scale_stride;
        const float scale = s->scale[b];
        const float zero = r->zero ? r->zero[place] : 0.0f;
        float *block = x + b * count;
        const int is_valid = round_block(&r->format, block, count, make_divisor(scale, s->inverse[b], is_safe), zero);
        s->scale[b] = is_valid ? scale : NAN; /* of the whole numbers, which cannot be NaN */
        if (!q->tokens)
            for (int64_t i = 0; i < count; i++) block[i] = (block[i] - zero) * scale;
        else if (!is_valid)
            memset(block, 0, (size_t)count * 4);
        if (q->tokens && r->zero) {
            const float number = is_valid ? zero / r->format.smallest : 0.0f;
            q->tokens->zero[first + b] = (int32_t)number + q->tokens->offset;
        }
    }
}

/* Quantizes `blocks` blocks, which fit the arrays. */
ALWAYS_INLINE void quantize_chunk(const Quantization *q, int64_t first, int64_t blocks, float *x,
                                  const Scratch *s, float *squares, int has_fma) {
    const Rounding *r = q->rounding;
    const int64_t start = first * q->group, count = blocks * q->group;
    if (r->dtype == FLOAT32)
        memcpy(x, (const float *)q->x + start, (size_t)count * 4);
    else
        for (int64_t i = 0; i < count; i++) x[i] = read_bfloat16(((const uint16_t *)q->x)[start + i]);
    switch (q->group) { /* short blocks of a known length become a few vectors */
    case 16: round_blocks(q, first, blocks, x, 16, s, squares, has_fma); break;
    case 32: round_blocks(q, first, blocks, x, 32, s, squares, has_fma); break;
    case 64: round_blocks(q, first, blocks, x, 64, s, squares, has_fma); break;
    default: round_blocks(q, first, blocks, x, q->group, s, squares, has_fma);
    }
    if (q->tokens) {
        for (int64_t b = 0; b < blocks; b++) q->tokens->scale[first + b] = s->scale[b] * r->format.smallest;
        store_numbers(q, start, x, count);
    } else if (r->dtype == FLOAT32) {
        memcpy((float *)q->values + start, x, (size_t)count * 4);
    } else {
        for (int64_t i = 0; i < count; i++) ((uint16_t *)q->values)[start + i] = round_to_bfloat16(x[i]);
    }
}

/* Quantizes some blocks, as many at a time as the nearest cache holds. */
ALWAYS_INLINE void quantize_blocks(Quantization *q, int64_t first, int64_t last, int has_fma) {
    const int64_t most = q->group < CHUNK ? CHUNK / q->group : 1, count = most * q->group;
    float *x = allocate((count + 7 * most + SIDE * q->group) * 4);
    if (!x) {
        q->failed = 1;
        return;
    }
    float *arrays[7];
    for (int i = 0; i < 7; i++) arrays[i] = x + count + i * most;
    const Scratch scratch = {arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5], (int32_t *)arrays[6]};
    float *squares = x + count + 7 * most;
    for (int64_t b = first; b < last; b += most)
        quantize_chunk(q, b, b + most < last ? most : last - b, x, &scratch, squares, has_fma);
    free(x);
}

/* The same code, vectorized for each instruction set by the compiler. */
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void quantize_avx512(
    void *q, int64_t first, int64_t last) {
    quantize_blocks(q, first, last, 1);
}
__attribute__((target("avx2,fma"))) static void quantize_avx2(void *q, int64_t first, int64_t last) {
    quantize_blocks(q, first, last, 1);
}
#endif
static void quantize_portable(void *q, int64_t first, int64_t last) {
#if defined(__aarch64__)
    quantize_blocks(q, first, last, 1);
#else
    quantize_blocks(q, first, last, 0);
#endif
}

/* Quantizes `count` values, in blocks of `group`, to whole numbers or to values of x's type.
 * Returns 0, or 1 if there is not enough memory. */
int fp4dit_quantize(const Rounding *rounding, const void *x, int64_t count, int64_t group,
                    Tokens *tokens, void *values, int threads) {
    Quantization q = {rounding, x, tokens, values, count / group, group, 0};
    void (*run)(void *, int64_t, int64_t) = quantize_portable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        run = quantize_avx512;
    else if (supports_avx2())
        run = quantize_avx2;
#endif
    run_parallel(run, &q, q.blocks, threads);
    return q.failed;
}
