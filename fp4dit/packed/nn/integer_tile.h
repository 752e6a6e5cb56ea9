/* Template of the innermost loop: a tile of ROWS tokens times COLUMNS vectors of weight rows.
 *
 * integer_kernels.c includes it once for each instruction set and number of rows, after it defined
 * the name, the target, the vector types and the instruction that multiplies. The sums are named
 * variables, because gcc keeps an array of vectors on the stack. They are unsigned, because they may
 * overflow until the correction is added.
 */
#define ZERO(r, c) vint s##r##c = {0};
#define SHIFT(r, c) s##r##c <<= 8;
#define START(r, c) s##r##c = *(const vint *)(correction + c * LANES);
#define ADD_CORRECTION(r, c) s##r##c += *(const vint *)(correction + c * LANES);
#define ADD_ZERO(r, c) s##r##c += *(const vint *)(correction + c * LANES) * (uint32_t)(zero[r * groups] - unflip);
#define LOAD(c) const vint w##c = *(const vint *)(b + c * sizeof(vint));
#define MULTIPLY(r, c) DOT(s##r##c, token, w##c)
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

/* Computes y[r * PANEL + j] of ROWS tokens, for the rows of the weight from `first` of the panel on. */
TARGET static void NAME(const Tokens *x, int64_t row, const Panel *panel, int64_t first, float *y) {
    typedef int32_t vsigned __attribute__((vector_size(sizeof(vint))));
    vfloat total[ROWS][COLUMNS];
    const int64_t k = x->k, groups = k / x->group;
    const int32_t *correction = panel->correction + first;
    const float *scale = panel->scale + first;
    const int64_t segments_of_group = x->group / panel->segment;
    memset(total, 0, sizeof total);
    for (int64_t start = 0, s = 0; start < k; start += panel->segment, s++) {
        /* Divisions are slow, and seldom needed. */
        const int64_t group = row * groups + (groups == 1             ? 0
                                              : segments_of_group == 1 ? s
                                                                       : s / segments_of_group);
        EACH(ZERO)
        if (x->planes == 1 && !x->zero) {
            EACH(START)
        }
        for (int plane = 0; plane < x->planes; plane++) {
            const uint8_t *a = x->numbers + plane * x->m * k + row * k + start;
            const int8_t *b = panel->weight + start * PANEL + 4 * first;
            const uint8_t *end = a + panel->segment;
            if (plane) {
                EACH(SHIFT)
            }
            for (; a < end; a += 4, b += 4 * PANEL) {
                EACH_VECTOR(LOAD)
                EACH_ROW(MULTIPLY_ROW)
            }
        }
        if (x->zero) {
            const int32_t *zero = x->zero + group;
            const int32_t unflip = UNFLIP & ((1 << 8 * x->planes) - 1);
            EACH(ADD_ZERO)
        } else if (x->planes > 1) {
            EACH(ADD_CORRECTION)
        }
        if (groups == 1) {
            EACH(ADD_TO_TOTAL)
        } else {
            const float *token_scale = x->scale + group;
            EACH(ADD_TO_TOTAL_BY_GROUP)
        }
        correction += PANEL, scale += PANEL;
    }
    for (int r = 0; r < ROWS; r++) memcpy(y + r * PANEL + first, total[r], sizeof total[r]);
}

#ifdef SUM_NAME
#define ADD_ONES(r, c) DOT(s##r##c, ones, w##c)
#define STORE(r, c) *(vint *)(sums + first + c * LANES) = s##r##c;
/* Sums up `count` columns of each row of a panel. */
TARGET static void SUM_NAME(const int8_t *weight, int64_t count, int32_t *sums) {
    const vint ones = (vint){0} + 0x01010101u;
    for (int64_t first = 0; first < PANEL; first += COLUMNS * LANES) {
        const int8_t *b = weight + 4 * first;
        EACH(ZERO)
        for (int64_t i = 0; i < count; i += 4, b += 4 * PANEL) {
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
        int8_t *out = weight + 4 * first;
        for (int64_t i = 0; i < k; i += codes_in_word, out += codes_in_word * PANEL) {
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
                *(vint *)(out + 4 * half * PANEL) = LOOK_UP(values, four);
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

#undef ZERO
#undef SHIFT
#undef START
#undef ADD_CORRECTION
#undef ADD_ZERO
#undef LOAD
#undef MULTIPLY
#undef MULTIPLY_ROW
#undef SCALE
#undef TO_FLOAT
#undef ADD_TO_TOTAL
#undef ADD_TO_TOTAL_BY_GROUP
#undef NAME
#undef ROWS
#undef EACH_ROW
#undef EACH
