/* Template of the innermost loop: a tile of ROWS tokens times COLUMNS vectors of weight rows.
 *
 * integer_kernels.c includes it once for each instruction set and number of rows, after it defined
 * the name, the target, the vector types and the instruction that multiplies. The sums are named
 * variables, because gcc keeps an array of vectors on the stack. They are unsigned, because they may
 * overflow until the correction is added.
 *
 * With PAIRS, DOT sums up pairs of products in 16 bits, of which STEP columns fit, and ADD_PAIRS adds
 * them to the sums.
 */
#define BODY CONCATENATE(NAME, _body)
#define WIDTH (COLUMNS * LANES)
#define ZERO(r, c) vint s##r##c = {0};
#define SHIFT(r, c) s##r##c <<= 8;
#define START(r, c) s##r##c = *(const vint *)(correction + c * LANES);
#define ADD_CORRECTION(r, c) s##r##c += *(const vint *)(correction + c * LANES);
#define ADD_ZERO(r, c) s##r##c += *(const vint *)(correction + c * LANES) * (uint32_t)(zero[r * groups] - unflip);
#define LOAD(c) const vint w##c = *(const vint *)(b + c * sizeof(vint));
#ifdef PAIRS
#define CLEAR(r, c) vint p##r##c = {0};
#define MULTIPLY(r, c) DOT(p##r##c, token, w##c)
#define ADD(r, c) ADD_PAIRS(s##r##c, p##r##c)
#else
#define MULTIPLY(r, c) DOT(s##r##c, token, w##c)
#endif
#define MULTIPLY_ROW(r)                                \
    {                                                  \
        uint32_t four;                                 \
        memcpy(&four, a + r * k, 4);                   \
        const vint token = (vint){0} + (four ^ FLIP);  \
        EACH_COLUMN(MULTIPLY, r)                       \
    }
#define SCALE(c) (*(const vfloat *)(scale + c * LANES))
#define TO_FLOAT(s) __builtin_convertvector((vsigned)(s), vfloat)
#define ADD_TO_TOTAL(r, c) total[r][c] = FMA(TO_FLOAT(s##r##c), SCALE(c), total[r][c]);
#define ADD_TO_TOTAL_BY_GROUP(r, c) \
    total[r][c] = FMA(TO_FLOAT(s##r##c), SCALE(c) * token_scale[r * groups], total[r][c]);

/* Computes y[r * PANEL + j] of ROWS tokens, for the rows of the weight from `first` of the panel on.
 * The last three arguments are those of the tokens and the panel; constants make it faster. */
TARGET ALWAYS_INLINE void BODY(const Tokens *x, int64_t row, const Panel *panel, int64_t first, float *y,
                               const int planes, const int64_t segment, const int64_t segments_of_group) {
    typedef int32_t vsigned __attribute__((vector_size(sizeof(vint))));
    vfloat total[ROWS][COLUMNS];
    const int64_t k = x->k, groups = k / x->group;
    const int32_t *correction = panel->correction + first;
    const int32_t unflip = UNFLIP & ((1 << 8 * planes) - 1);
    const float *scale = panel->scale + first, *token_scale = x->scale + row * groups;
    const int32_t *zero = x->zero ? x->zero + row * groups : NULL;
    int64_t left_of_group = segments_of_group;
    memset(total, 0, sizeof total);
    for (int64_t start = 0; start < k; start += segment) {
        EACH(ZERO)
        if (planes == 1 && !zero) {
            EACH(START)
        }
        for (int plane = 0; plane < planes; plane++) {
            const uint8_t *a = x->numbers + plane * x->m * k + row * k + start;
            const int8_t *b = panel->weight + first * k + start * WIDTH;
            const uint8_t *end = a + segment;
            if (plane) {
                EACH(SHIFT)
            }
#ifdef PAIRS
            while (a < end) {
                EACH(CLEAR)
#pragma GCC unroll 4
                for (int i = 0; i < STEP; i += 4, a += 4, b += 4 * WIDTH) {
                    EACH_VECTOR(LOAD)
                    EACH_ROW(MULTIPLY_ROW)
                }
                EACH(ADD)
            }
#else
            for (; a < end; a += 4, b += 4 * WIDTH) {
                EACH_VECTOR(LOAD)
                EACH_ROW(MULTIPLY_ROW)
            }
#endif
        }
        if (zero) {
            EACH(ADD_ZERO)
        } else if (planes > 1) {
            EACH(ADD_CORRECTION)
        }
        if (groups == 1) {
            EACH(ADD_TO_TOTAL)
        } else {
            EACH(ADD_TO_TOTAL_BY_GROUP)
        }
        if (--left_of_group == 0) {
            left_of_group = segments_of_group;
            if (zero) zero++;
            token_scale++;
        }
        correction += PANEL, scale += PANEL;
    }
    for (int r = 0; r < ROWS; r++) memcpy(y + r * PANEL + first, total[r], sizeof total[r]);
}

TARGET static void NAME(const Tokens *x, int64_t row, const Panel *panel, int64_t first, float *y) {
    const int64_t segment = panel->segment;
    if (x->planes == 1 && !x->zero && x->group == 16 && segment == 16)
        BODY(x, row, panel, first, y, 1, 16, 1);
    else if (x->planes == 1 && !x->zero)
        BODY(x, row, panel, first, y, 1, segment, x->group / segment);
    else
        BODY(x, row, panel, first, y, x->planes, segment, x->group / segment);
}

#ifdef SUM_NAME
#define ADD_ONES(r, c) DOT(s##r##c, ones, w##c)
#define STORE(r, c) *(vint *)(sums + first + c * LANES) = s##r##c;
/* Sums up columns `start` to `start + count` of each row of a panel. */
TARGET static void SUM_NAME(const int8_t *weight, int64_t k, int64_t start, int64_t count, int32_t *sums) {
    const vint ones = (vint){0} + 0x01010101u;
    for (int64_t first = 0; first < PANEL; first += WIDTH) {
        const int8_t *b = weight + first * k + start * WIDTH;
        EACH(ZERO)
        for (int64_t i = 0; i < count; i += 4, b += 4 * WIDTH) {
            EACH_VECTOR(LOAD)
            EACH(ADD_ONES)
        }
        EACH(STORE)
    }
}
/* Expands codes, some of each of LANES rows at a time. Those of 4 bits are looked up in a table of
 * 16 values, and those of 8 bits are a sign and a magnitude. */
TARGET static void EXPAND_NAME(const uint8_t *codes, int64_t rows, int64_t k, int bits,
                               const int8_t *table, int8_t *weight) {
    const vint values = REPEAT_TABLE(table);
    const int64_t codes_in_word = 32 / bits, row_bytes = k * bits / 8;
    for (int64_t first = 0; first < PANEL; first += LANES) {
        const uint8_t *row[LANES];
        for (int64_t j = 0; j < LANES; j++)
            row[j] = codes + (first + j < rows ? first + j : rows - 1) * row_bytes;
        int8_t *out = weight + first / WIDTH * WIDTH * k + 4 * (first % WIDTH);
        for (int64_t i = 0; i < k; i += codes_in_word, out += codes_in_word * WIDTH) {
            int32_t words[LANES];
            for (int64_t j = 0; j < LANES; j++) memcpy(&words[j], row[j] + i * bits / 8, 4);
            vint word;
            memcpy(&word, words, sizeof word);
            if (bits == 8) {
                const vbyte code = (vbyte)word, is_negative = code < 0;
                *(vint *)out = (vint)(((code & 127) ^ is_negative) - is_negative);
                continue;
            }
            for (int half = 0; half < 2; half++) {
                vint four = word >> (16 * half) & 0xffff; /* spread over the bytes of a word */
                four = (four | four << 8) & 0x00ff00ff;
                four = (four | four << 4) & 0x0f0f0f0f;
                *(vint *)(out + 4 * half * WIDTH) = LOOK_UP(values, four);
            }
        }
    }
}

TARGET static void STORE_NAME(const Product *p, int64_t row, int64_t rows, int64_t first,
                              const float *total) {
    store_rows(p, row, rows, first, total);
}
#undef SUM_NAME
#undef STORE_NAME
#undef EXPAND_NAME
#undef ADD_ONES
#undef STORE
#endif

#undef WIDTH
#undef ZERO
#undef SHIFT
#undef START
#undef ADD_CORRECTION
#undef ADD_ZERO
#undef LOAD
#undef MULTIPLY
#undef CLEAR
#undef ADD
#undef MULTIPLY_ROW
#undef SCALE
#undef TO_FLOAT
#undef ADD_TO_TOTAL
#undef ADD_TO_TOTAL_BY_GROUP
#undef NAME
#undef BODY
#undef ROWS
#undef EACH_ROW
#undef EACH
