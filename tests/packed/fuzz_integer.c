/* Random products by every kernel of this machine, compared to the bit with a plain computation.
 *
 *     fuzz_integer FIRST COUNT
 *
 * runs COUNT cases, numbered from FIRST on, and prints how many products each kernel computed. A case
 * depends on its number only. All arrays have exactly the size that the kernels are told, so that a
 * sanitizer finds what they read or write beyond. test_integer_fuzz.py compiles and runs it.
 */
#include "integer_kernels.c"

#include <stdio.h>

static uint64_t state; /* of the random numbers */
static int64_t case_number;
static int64_t used[8]; /* products by each kernel */

/* Draws 64 bits (splitmix64). Draws in one expression would be in an order of the compiler's. */
static uint64_t draw(void) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Draws a number from low to high. */
static int64_t draw_from(int64_t low, int64_t high) {
    return low + (int64_t)(draw() % (uint64_t)(high - low + 1));
}

static int one_of(int count) { return draw_from(1, count) == 1; }

static void fail(const char *what, int64_t place) {
    printf("case %lld: %s differ at %lld\n", (long long)case_number, what, (long long)place);
    exit(1);
}

static void *make(int64_t size) {
    void *memory = malloc(size ? (size_t)size : 1);
    if (!memory) abort();
    return memory;
}

/* Returns whether two numbers are the same, or both NaN. Zeros have no sign here. */
static int is_same(float a, float b) { return a == b || (a != a && b != b); }

/* Draws a number: mostly near a power of two, or one that is hard. */
static float draw_value(float typical) {
    static const float hard[] = {0.0f,    -0.0f,    NAN,      INFINITY, -INFINITY, 3.4e38f,
                                 -3.4e38f, 1e-45f, -1e-40f, 1.1754944e-38f, 1.0f};
    if (one_of(400)) return hard[draw_from(0, 10)];
    return typical * (float)draw_from(-1000, 1000) / 500.0f;
}

/* ---- Formats and tokens. ---- */

typedef struct {
    int mantissa, min_exponent;
    double largest, least;
    int64_t number; /* the largest whole number */
    int planes, offset;
} Grid;

static Grid make_integer(int digits) {
    return (Grid){.mantissa = digits, .min_exponent = digits, .largest = ldexp(1, digits) - 1};
}

/* Makes a float whose largest codes may be reserved. */
static Grid make_float(int exponent, int mantissa, int reserved) {
    const int bias = (1 << (exponent - 1)) - 1, code = (1 << (exponent + mantissa)) - 1 - reserved;
    const int top = code >> mantissa, fraction = code & ((1 << mantissa) - 1);
    return (Grid){.mantissa = mantissa, .min_exponent = 1 - bias,
                  .largest = ldexp(1 + ldexp(fraction, -mantissa), top - bias)};
}

static double find_smallest(const Grid *grid) {
    return ldexp(1, grid->min_exponent - grid->mantissa);
}

static Grid draw_grid(void) {
    for (;;) {
        Grid grid = make_integer((int)(one_of(4) ? draw_from(8, 19) : draw_from(1, 8)));
        if (one_of(2)) {
            const int exponent = (int)draw_from(1, 4), mantissa = (int)draw_from(0, 5);
            grid = make_float(exponent, mantissa, mantissa && one_of(4));
        }
        grid.number = (int64_t)(grid.largest / find_smallest(&grid));
        grid.least = grid.number < 256 && one_of(3) ? 0 : -grid.largest;
        grid.planes = grid.least == 0 || grid.number < 128 ? 1 : grid.number < 32768 ? 2 : 3;
        grid.offset = grid.least == 0 ? 0 : 1 << (8 * grid.planes - 1);
        if (grid.number < 1 << 23) return grid;
    }
}

/* Describes a format to the kernels. */
static Format describe(const Grid *grid, double least) {
    return (Format){ldexpf(1, grid->min_exponent), ldexpf(1.5f, 23 - grid->mantissa),
                    (float)find_smallest(grid), (float)grid->largest, (float)least};
}

/* Rounds to the nearest value of a format, and of two the even one. */
static double round_to_nearest(const Grid *grid, double value) {
    int exponent;
    value = fmin(fmax(value, grid->least), grid->largest);
    frexp(value, &exponent);
    if (value == 0 || exponent - 1 < grid->min_exponent) exponent = grid->min_exponent + 1;
    const double step = ldexp(1, exponent - 1 - grid->mantissa);
    return nearbyint(value / step) * step;
}

enum { MOST_RATIOS = 3 };

typedef struct {
    int64_t m, k, group, groups;
    Grid grid, scales; /* scales.largest = 0: fp32 */
    Rounding rounding;
    void *x;
    float *scale, *zero; /* given, or NULL */
    float ratios[MOST_RATIOS];
    int64_t *number;    /* m x k: what the values are, */
    float *token_scale; /* m x groups */
    float *value;       /* m x k: and dequantized */
    int *tied;          /* m x groups: whether the errors of two scales are about equal */
} Source;

static float read_value(const void *x, int dtype, int64_t i) {
    return dtype == FLOAT32 ? ((const float *)x)[i] : read_bfloat16(((const uint16_t *)x)[i]);
}

/* Rounds to bf16 by comparing with both neighbors. */
static float round_like_bfloat16(float value) {
    if (value != value || isinf(value)) return value;
    const float magnitude = fabsf(value);
    uint32_t bits;
    memcpy(&bits, &magnitude, 4);
    const float below = read_bfloat16((uint16_t)(bits >> 16));
    const float next = read_bfloat16((uint16_t)((bits >> 16) + 1));
    const double above = isinf(next) ? 0x1p128 : next, middle = (below + above) / 2;
    const int up = magnitude > middle || (magnitude == middle && (bits >> 16 & 1));
    return copysignf(up ? next : below, value);
}

/* Returns the scale of NVFP4 by exact sums of errors. */
static float choose_scale(const Source *s, int64_t block, float absmax) {
    volatile float ideal = absmax / (float)s->grid.largest;
    ideal /= s->rounding.tensor_scale;
    float best = NAN;
    double least = INFINITY;
    s->tied[block] = 0;
    for (int i = 0; i < s->rounding.num_ratios; i++) {
        const volatile float wanted = s->ratios[i] * ideal;
        double code = round_to_nearest(&s->scales, wanted);
        if (wanted != wanted) code = NAN;
        const volatile float scale =
            (float)(code < s->rounding.scales.least ? s->rounding.scales.least : code) *
            s->rounding.tensor_scale;
        double sum = 0;
        for (int64_t c = block * s->group; c < (block + 1) * s->group; c++) {
            const float x = read_value(s->x, s->rounding.dtype, c);
            const volatile float quotient = x / scale;
            volatile float error = (float)round_to_nearest(&s->grid, quotient) * scale;
            error -= x;
            error *= error;
            sum += quotient == quotient ? error : NAN;
        }
        const double close = 1e-6 * (double)s->group * least;
        if (i && scale != best && !(fabs(sum - least) > close)) s->tied[block] = 1;
        if (!i || sum < least) best = scale, least = sum;
    }
    return best;
}

/* Returns the scale that a rule gives a block. */
static float find_scale(const Source *s, int64_t block) {
    if (s->scale) return s->scale[s->rounding.scale_stride ? block : 0];
    float absmax = 0;
    for (int64_t i = block * s->group; i < (block + 1) * s->group; i++) {
        const float x = fabsf(read_value(s->x, s->rounding.dtype, i));
        absmax = absmax != absmax || absmax > x ? absmax : x;
    }
    if (s->rounding.rule == NVFP4) return choose_scale(s, block, absmax);
    if (absmax != absmax) return NAN;
    if (s->rounding.rule == E8M0_EVEN) {
        if (absmax == 0) return 1;
        if (isinf(absmax)) return NAN;
        /* Rounded to the format's mantissa, absmax may reach the next power of two. */
        const int top = (int)floor(log2(s->grid.largest));
        int exponent = ilogb(absmax);
        const double mantissa = ldexp(absmax, -exponent), step = ldexp(1, -s->grid.mantissa);
        exponent += mantissa >= 2 - step / 2;
        return ldexpf(1, (int)fmin(fmax(exponent - top, -127), 127));
    }
    const volatile float scale = absmax / (float)s->grid.largest;
    const double least = s->scales.largest ? find_smallest(&s->scales) : 0x1p-126;
    return (float)fmax(s->scales.largest ? round_to_nearest(&s->scales, scale) : scale, least);
}

/* Quantizes by the definition. Sets the scale to NaN if a quotient is NaN. */
static void quantize_by_definition(Source *s) {
    const double smallest = find_smallest(&s->grid);
    for (int64_t block = 0; block < s->m * s->groups; block++) {
        s->tied[block] = 0;
        const float by = find_scale(s, block);
        const float add = s->zero ? s->zero[s->rounding.scale_stride ? block : 0] : 0;
        int is_valid = 1;
        for (int64_t i = block * s->group; i < (block + 1) * s->group; i++) {
            volatile float quotient = read_value(s->x, s->rounding.dtype, i) / by;
            quotient += add;
            s->number[i] = 0;
            s->value[i] = NAN;
            is_valid &= quotient == quotient;
            if (quotient != quotient) continue;
            const double rounded = round_to_nearest(&s->grid, quotient);
            s->number[i] = (int64_t)((rounded - add) / smallest);
            const volatile float distance = (float)rounded - add;
            s->value[i] = distance * by;
            if (s->rounding.dtype == BFLOAT16) s->value[i] = round_like_bfloat16(s->value[i]);
        }
        s->token_scale[block] = is_valid ? by * (float)smallest : NAN;
    }
}

static void draw_values(Source *s, int is_tie) {
    const int64_t size = s->m * s->k;
    float *values = s->x = make(size * 4);
    for (int64_t row = 0; row < s->m; row++) {
        const float typical = one_of(20) ? 0 : ldexpf(1, (int)draw_from(-30, 30));
        for (int64_t i = row * s->k; i < (row + 1) * s->k; i++) {
            values[i] = draw_value(one_of(50) ? typical * 100 : typical);
            const int64_t reach = s->grid.number < 50 ? 3 * s->grid.number : 150;
            if (is_tie) values[i] = (float)(find_smallest(&s->grid) / 2 * (double)draw_from(-reach, reach));
        }
    }
    if (s->rounding.dtype == FLOAT32) return;
    s->x = make(size * 2);
    for (int64_t i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        ((uint16_t *)s->x)[i] = (uint16_t)(bits >> 16);
    }
    free(values);
}

static void draw_given_scales(Source *s, int is_tie) {
    const int64_t count = one_of(3) ? 1 : s->m * s->groups;
    const int has_zero = one_of(2);
    s->scale = make(count * 4);
    s->zero = has_zero ? make(count * 4) : NULL;
    for (int64_t i = 0; i < count; i++) {
        s->scale[i] = is_tie ? 1 : fabsf(draw_value(1)) + 1e-4f;
        if (one_of(40)) s->scale[i] = ldexpf(1, (int)draw_from(-126, 126));
        const int64_t low = s->grid.least == 0 ? 0 : -s->grid.number;
        const double zero = (double)draw_from(low, s->grid.number);
        if (has_zero) s->zero[i] = one_of(100) ? NAN : (float)(find_smallest(&s->grid) * zero);
    }
    s->rounding.scale = s->scale;
    s->rounding.zero = s->zero;
    if (count > 1) s->rounding.scale_stride = 1;
}

static void draw_rule(Source *s) {
    static const float ratios[] = {1, 1.5f, 0.8f};
    Rounding *r = &s->rounding;
    r->rule = (int)draw_from(ABSMAX, NVFP4);
    r->scales = (Format){.largest = INFINITY, .least = 0x1p-126f};
    if (r->rule == ABSMAX && one_of(2)) s->scales = make_float(5, 10, 1024); /* fp16 */
    if (r->rule == NVFP4) s->scales = make_float(4, 3, 1);
    if (s->scales.largest) r->scales = describe(&s->scales, find_smallest(&s->scales));
    r->tensor_scale = 1 + (float)draw_from(0, 999) / 1000;
    r->tensor_scale *= ldexpf(1, (int)draw_from(-20, 10));
    memcpy(s->ratios, ratios, sizeof ratios);
    r->num_ratios = (int)draw_from(1, MOST_RATIOS);
}

static Source draw_source(int64_t k, int64_t group, int dtype) {
    static const int64_t rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 32, 75};
    Source s = {.m = rows[draw_from(0, one_of(4) ? 11 : 9)], .k = k, .group = group, .groups = k / group};
    s.grid = draw_grid();
    s.rounding.format = describe(&s.grid, s.grid.least);
    s.rounding.dtype = dtype;
    const int is_tie = one_of(4); /* multiples of half the smallest value, with scale 1 */
    draw_values(&s, is_tie);
    if (is_tie || s.grid.least == 0 || one_of(2))
        draw_given_scales(&s, is_tie);
    else
        draw_rule(&s);
    s.number = make(s.m * k * 8);
    s.token_scale = make(s.m * s.groups * 4);
    s.value = make(s.m * k * 4);
    s.tied = make(s.m * s.groups * (int64_t)sizeof(int));
    quantize_by_definition(&s);
    return s;
}

/* Quantizes by one of the compiled functions, and compares. */
static Tokens check_tokens(const Source *s, void (*run)(void *, int64_t, int64_t)) {
    const int64_t size = s->m * s->k, blocks = s->m * s->groups;
    const int bytes = s->rounding.dtype == FLOAT32 ? 4 : 2;
    Tokens tokens = {s->m, s->k, s->group, s->grid.planes, s->grid.offset, make(size * s->grid.planes),
                     make(blocks * 4), s->zero ? make(blocks * 4) : NULL};
    Rounding rounding = s->rounding;
    rounding.ratios = s->ratios;
    if (rounding.num_ratios > 1) rounding.undecided = calloc((size_t)blocks, 1);
    Quantization q = {&rounding, s->x, &tokens, NULL, s->m * s->groups, s->group, 0};
    run_parallel(run, &q, q.blocks, (int)draw_from(1, 5));
    void *values = make(size * bytes);
    q.tokens = NULL, q.values = values;
    run_parallel(run, &q, q.blocks, (int)draw_from(1, 5));
    for (int64_t block = 0; block < blocks; block++) {
        if (rounding.undecided && rounding.undecided[block] && !s->tied[block])
            fail("decisions", block);
        /* Python chooses where the kernel is undecided. */
        if (rounding.undecided && rounding.undecided[block]) continue;
        const float scale = tokens.scale[block];
        if (!is_same(scale, s->token_scale[block])) fail("scales of tokens", block);
        for (int64_t i = block * s->group; i < (block + 1) * s->group; i++) {
            int64_t number = 0;
            for (int plane = 0; plane < s->grid.planes; plane++)
                number = number << 8 | tokens.numbers[plane * size + i];
            number -= s->zero ? tokens.zero[block] : tokens.offset;
            if (scale == scale && number != s->number[i]) fail("numbers of tokens", i);
            if (!is_same(read_value(values, s->rounding.dtype, i), s->value[i])) fail("values", i);
        }
    }
    free(values), free(rounding.undecided);
    return tokens;
}

static int has_ties(const Source *s) {
    for (int64_t block = 0; block < s->m * s->groups; block++)
        if (s->tied[block]) return 1;
    return 0;
}

static void free_tokens(Tokens *t) { free(t->numbers), free(t->scale), free(t->zero); }

static void free_source(Source *s) {
    free(s->x), free(s->scale), free(s->zero);
    free(s->number), free(s->token_scale), free(s->value), free(s->tied);
}

/* ---- Weights and products. ---- */

typedef struct {
    Weight w;
    int largest;
    int64_t segment; /* columns whose products are summed up in whole numbers */
    int8_t *number; /* n x k: the whole numbers */
    float *scale;   /* n x k / group */
} Matrix;

static float read_float16_by_definition(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double value = exponent == 31   ? (fraction ? NAN : INFINITY)
                         : exponent == 0 ? ldexp(fraction, -24)
                                         : ldexp(1024 + fraction, exponent - 25);
    return (float)(half >> 15 ? -value : value);
}

static void draw_codes(Matrix *x, int tables, int8_t *table, uint8_t *codes) {
    Weight *w = &x->w;
    static const int limits[] = {1, 12, 16, 64, 127};
    const int limit = limits[draw_from(0, 4)];
    for (int i = 0; i < tables * 256; i++) { /* byte by byte, or by the 16 values of 4 bits */
        const int value = (int)draw_from(-limit, limit), magnitude = i & 127;
        if (w->bits == 8) table[i] = (int8_t)value;
        /* Without a choice of tables, codes of 8 bits are a sign and a magnitude. */
        if (w->bits == 8 && !w->table_index) table[i] = (int8_t)(i < 128 ? magnitude : -magnitude);
        if (w->bits == 4 && i % 256 < 16)
            for (int other = 0; other < 16; other++) {
                table[2 * (i + 16 * other)] = (int8_t)value;
                table[2 * (i / 256 * 256 + 16 * (i % 256) + other) + 1] = (int8_t)value;
            }
    }
    for (int64_t i = 0; i < w->n * w->k; i++) {
        const uint8_t code = (uint8_t)(draw() & (w->bits == 4 ? 15 : 255));
        const int64_t block = i / w->group, index = w->table_index ? w->table_index[block] : 0;
        uint8_t *byte = codes + i * w->bits / 8;
        if (w->bits == 8)
            *byte = code;
        else
            *byte = (uint8_t)(i % 2 ? (*byte & 15) | code << 4 : code);
        x->number[i] = table[w->bits == 8 ? index * 256 + code : index * 512 + 2 * code];
        if (abs(x->number[i]) > x->largest) x->largest = abs(x->number[i]);
    }
}

static void draw_scales(Matrix *x, int tables, uint8_t *scales, float *values, float *factors) {
    Weight *w = &x->w;
    for (int i = 0; i < tables; i++) factors[i] = ldexpf(1, (int)draw_from(-6, 0));
    const int64_t rows = w->scale_values_stride ? tables : 1;
    for (int64_t i = 0; values && i < rows * 256; i++) values[i] = draw_value(1);
    for (int64_t block = 0; block < w->n * w->k / w->group; block++) {
        const int64_t index = w->table_index ? w->table_index[block] : 0;
        float scale = draw_value(0.01f);
        if (w->scale_bytes == 1) {
            scales[block] = (uint8_t)draw();
            scale = values[index * w->scale_values_stride + scales[block]];
        } else if (w->scale_bytes == 2) {
            const uint16_t half = (uint16_t)draw();
            memcpy(scales + 2 * block, &half, 2);
            scale = read_float16_by_definition(half);
        } else {
            memcpy(scales + 4 * block, &scale, 4);
        }
        x->scale[block] = scale * factors[index];
    }
}

static Matrix draw_matrix(int64_t k, int64_t group) {
    static const int64_t counts[] = {1, 7, 31, 63, 64, 65, 100, 128, 130};
    Matrix x = {.w = {.n = counts[draw_from(0, 8)], .k = k, .group = group}};
    Weight *w = &x.w;
    static const int bytes[] = {1, 2, 4};
    w->bits = one_of(4) ? 8 : 4;
    w->scale_bytes = bytes[draw_from(0, 2)];
    const int has_index = one_of(2), tables = has_index ? (int)draw_from(1, 16) : 1;
    const int64_t blocks = w->n * k / group;
    uint8_t *index = has_index ? make(blocks) : NULL;
    for (int64_t i = 0; has_index && i < blocks; i++) index[i] = (uint8_t)draw_from(0, tables - 1);
    int8_t *table = make(tables * (w->bits == 4 ? 512 : 256));
    uint8_t *codes = make(w->n * k * w->bits / 8), *scales = make(blocks * w->scale_bytes);
    w->scale_values_stride = w->scale_bytes == 1 && one_of(2) ? 256 : 0;
    float *values = NULL;
    if (w->scale_bytes == 1) values = make((w->scale_values_stride ? tables : 1) * 1024);
    float *factors = make(tables * 4);
    w->table_index = index, w->tables = table, w->codes = codes;
    w->scales = scales, w->scale_values = values, w->factors = factors;
    x.number = make(w->n * k);
    x.scale = make(blocks * 4);
    draw_codes(&x, tables, table, codes);
    draw_scales(&x, tables, scales, values, factors);
    return x;
}

static void free_matrix(Matrix *x) {
    free((void *)x->w.table_index), free((void *)x->w.tables), free((void *)x->w.codes);
    free((void *)x->w.scales), free((void *)x->w.scale_values), free((void *)x->w.factors);
    free(x->number), free(x->scale);
}

/* Returns x W^T + bias, in the order of roundings that integer_tile.h defines. */
static float *multiply_by_definition(const Source *s, const Matrix *x, const void *bias, int dtype) {
    const Weight *w = &x->w;
    float *y = make(s->m * w->n * 4);
    for (int64_t i = 0; i < s->m; i++) {
        for (int64_t j = 0; j < w->n; j++) {
            volatile float total = 0;
            for (int64_t start = 0; start < w->k; start += x->segment) {
                int64_t sum = 0;
                for (int64_t c = start; c < start + x->segment; c++)
                    sum += s->number[i * w->k + c] * x->number[j * w->k + c];
                volatile float scale = x->scale[(j * w->k + start) / w->group];
                if (s->groups > 1) scale *= s->token_scale[(i * w->k + start) / s->group];
                total = fmaf((float)sum, scale, total);
            }
            if (s->groups == 1) total *= s->token_scale[i];
            if (bias) total += read_value(bias, dtype, j);
            y[i * w->n + j] = dtype == FLOAT32 ? total : round_like_bfloat16(total);
        }
    }
    return y;
}

static void check_products(const Source *s, const Tokens *tokens, Matrix *x) {
    const int dtype = one_of(2) ? FLOAT32 : BFLOAT16;
    const int64_t size = s->m * x->w.n, bytes = dtype == FLOAT32 ? 4 : 2;
    void *bias = one_of(2) ? make(x->w.n * bytes) : NULL;
    for (int64_t j = 0; bias && j < x->w.n; j++) {
        const float value = draw_value(1);
        memcpy((char *)bias + j * bytes, (const char *)&value + 4 - bytes, (size_t)bytes);
    }
    float *expected = multiply_by_definition(s, x, bias, dtype);
    for (int kernel = 0; kernel < NUM_KERNELS; kernel++) {
        const char *name = fp4dit_kernel_name(kernel);
        if (!name || x->largest > fp4dit_kernel_largest_weight(kernel)) continue;
        void *y = make(size * bytes);
        if (fp4dit_multiply(kernel, tokens, &x->w, x->segment, bias, dtype, y, (int)draw_from(1, 5))) abort();
        for (int64_t i = 0; i < size; i++)
            if (!is_same(read_value(y, dtype, i), expected[i])) fail(name, i);
        free(y);
        used[kernel]++;
    }
    free(expected), free(bias);
}

/* Draws a multiple of 4 that divides k: often k itself. */
static int64_t draw_group(int64_t k) {
    for (int64_t group = one_of(3) ? k : 4 * draw_from(1, k / 4);; group = 4 * draw_from(1, k / 4))
        if (k % group == 0) return group;
}

static void run_case(int64_t number) {
    static const int64_t columns[] = {4, 8, 12, 16, 20, 36, 48, 64, 96, 128, 192, 256, 260};
    case_number = number, state = (uint64_t)number * 0x2545f4914f6cdd1du;
    const int64_t k = columns[draw_from(0, 12)];
    const int dtype = one_of(2) ? FLOAT32 : BFLOAT16;
    const int64_t weight_group = draw_group(k), token_group = draw_group(k);
    Matrix x = draw_matrix(k, weight_group);
    Source s = draw_source(k, token_group, dtype);
    int64_t largest = 0;
    for (int64_t i = 0; i < s.m * k; i++) {
        const int64_t magnitude = s.number[i] < 0 ? -s.number[i] : s.number[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    x.segment = greatest_common_divisor(s.group, x.w.group);
    while (x.segment % 8 == 0 && (one_of(5) || x.segment * largest * x.largest > INT32_MAX))
        x.segment /= 2;
    const int is_exact = x.segment * largest * x.largest <= INT32_MAX && !has_ties(&s);
    void (*const runs[])(void *, int64_t, int64_t) = {
        quantize_portable,
#if defined(__x86_64__)
        __builtin_cpu_supports("avx2") ? quantize_avx2 : NULL,
        __builtin_cpu_supports("avx512dq") ? quantize_avx512 : NULL,
#endif
    };
    const int count = sizeof runs / sizeof *runs, chosen = (int)draw_from(0, count - 1);
    for (int i = 0; i < count; i++) {
        if (!runs[i]) continue;
        Tokens tokens = check_tokens(&s, runs[i]);
        if (is_exact && (i == chosen || !runs[chosen])) check_products(&s, &tokens, &x);
        free_tokens(&tokens);
    }
    free_source(&s), free_matrix(&x);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int64_t first = atoll(argv[1]), count = atoll(argv[2]);
    for (int64_t i = first; i < first + count; i++) run_case(i);
    for (int i = 0; i < NUM_KERNELS; i++)
        if (fp4dit_kernel_name(i)) printf("%s %lld\n", kernels[i].name, (long long)used[i]);
    return 0;
}
