/* The innermost loop on AMX: blocks of 32 tokens and 32 rows of the weight, in four tiles of sums.
 *
 * A tile multiplies 16 tokens by 16 rows of the weight, 64 columns at a time. Its sums leave it
 * through memory, because no other instruction reads a tile. While the tiles multiply a block, the
 * vectors add the sums of the block before it to the totals.
 */
#define AMX_TARGET __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq")))
#define AMX_SIDE 32
#define AMX_STEP 64 /* columns */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* gcc 12's intrinsics do not say that all of the configuration is read and written. */
#define LOAD_CONFIG(config) __asm__ volatile("ldtilecfg %0" : : "m"(config))
#define STORE_CONFIG(config) __asm__ volatile("sttilecfg %0" : "=m"(config))

/* Configures the tiles of this thread, and returns what they were. */
AMX_TARGET static void begin_amx(void *before) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = AMX_STEP, config.rows[i] = 16;
    STORE_CONFIG(*(TileConfig *)before);
    LOAD_CONFIG(config);
}

/* Gives the tiles back as another library left them. */
AMX_TARGET static void end_amx(const void *before) {
    const TileConfig *config = before;
    if (config->palette)
        LOAD_CONFIG(*config);
    else
        _tile_release();
}

/* Sums of a block, and what they are added to. */
typedef struct {
    uint32_t sums[3][AMX_SIDE * AMX_SIDE] __attribute__((aligned(64))); /* of each plane */
    const int32_t *correction, *zero;      /* zero: of the block's first token, or NULL */
    const float *scale, *token_scale;      /* token_scale: of the block's first token, or NULL */
    float *y;
} Block;

/* Adds rows `first` to `last` of a block's sums to the totals, rounding as integer_tile.h does. */
AMX_TARGET ALWAYS_INLINE void add_block_rows(const Block *b, int planes, int64_t groups, int64_t first,
                                             int64_t last) {
    typedef uint32_t vint __attribute__((vector_size(64), may_alias));
    typedef int32_t vsigned __attribute__((vector_size(64), may_alias));
    typedef float vfloat __attribute__((vector_size(64), may_alias));
    const int32_t *zero = b->zero; /* copies, which no store to y can change */
    const float *token_scale = b->token_scale;
    float *y = b->y;
    vint correction[2];
    vfloat scale[2];
    memcpy(correction, b->correction, sizeof correction);
    memcpy(scale, b->scale, sizeof scale);
    for (int64_t r = first; r < last; r++) {
        for (int c = 0; c < 2; c++) {
            vint sum = *(const vint *)(b->sums[0] + r * AMX_SIDE + 16 * c);
            for (int plane = 1; plane < planes; plane++)
                sum = (sum << 8) + *(const vint *)(b->sums[plane] + r * AMX_SIDE + 16 * c);
            vint add = correction[c];
            if (zero) add *= (uint32_t)zero[r * groups];
            sum += add;
            vfloat factor = scale[c];
            if (token_scale) factor *= token_scale[r * groups];
            const vfloat value = __builtin_convertvector((vsigned)sum, vfloat);
            vfloat *total = (vfloat *)(y + r * PANEL + 16 * c);
            *total = (vfloat)_mm512_fmadd_ps((__m512)value, (__m512)factor, (__m512)*total);
        }
    }
}

/* Sums up the products of one segment in one plane, and adds a share of the block before it. */
AMX_TARGET ALWAYS_INLINE void multiply_segment(const uint8_t *a, int64_t k, const int8_t *b,
                                               int64_t segment, uint32_t *sums, const Block *before,
                                               int planes, int64_t groups, int64_t first, int64_t last) {
    const int64_t steps = segment / AMX_STEP;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++, a += AMX_STEP, b += AMX_STEP * PANEL) {
        _tile_loadd(4, a, k);
        _tile_loadd(6, b, 4 * PANEL);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, b + 64, 4 * PANEL);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(5, a + 16 * k, k);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
        if (before)
            add_block_rows(before, planes, groups, first + (last - first) * i / steps,
                           first + (last - first) * (i + 1) / steps);
    }
    _tile_stored(0, sums, 4 * AMX_SIDE);
    _tile_stored(1, sums + 16, 4 * AMX_SIDE);
    _tile_stored(2, sums + 16 * AMX_SIDE, 4 * AMX_SIDE);
    _tile_stored(3, sums + 16 * AMX_SIDE + 16, 4 * AMX_SIDE);
}

/* Computes y[r * PANEL + j] of 32 tokens, for all rows of the panel. */
AMX_TARGET ALWAYS_INLINE void multiply_blocks(const Tokens *x, int64_t row, const Panel *panel, float *y,
                                              int planes) {
    Block blocks[2];
    const Block *before = NULL;
    const int64_t k = x->k, groups = k / x->group, segments_of_group = x->group / panel->segment;
    int turn = 0;
    memset(y, 0, AMX_SIDE * PANEL * 4);
    for (int64_t start = 0, s = 0; start < k; start += panel->segment, s++) {
        const int64_t group = row * groups + (groups == 1 ? 0 : s / segments_of_group);
        for (int64_t c = 0; c < PANEL; c += AMX_SIDE, turn ^= 1) {
            Block *block = &blocks[turn];
            for (int plane = 0; plane < planes; plane++)
                multiply_segment(x->numbers + (plane * x->m + row) * k + start, k,
                                 panel->weight + start * PANEL + 4 * c, panel->segment,
                                 block->sums[plane], before, planes, groups,
                                 AMX_SIDE * plane / planes, AMX_SIDE * (plane + 1) / planes);
            block->correction = panel->correction + s * PANEL + c;
            block->scale = panel->scale + s * PANEL + c;
            block->zero = x->zero ? x->zero + group : NULL;
            block->token_scale = groups > 1 ? x->scale + group : NULL;
            block->y = y + c;
            before = block;
        }
    }
    add_block_rows(before, planes, groups, 0, AMX_SIDE);
}

AMX_TARGET static void tile_amx(const Tokens *x, int64_t row, const Panel *panel, int64_t first, float *y) {
    (void)first; /* one tile has all rows of a panel */
    if (x->planes == 1) /* the most frequent number becomes a constant */
        multiply_blocks(x, row, panel, y, 1);
    else
        multiply_blocks(x, row, panel, y, x->planes);
}
