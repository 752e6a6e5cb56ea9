/* Products of quantized tokens and packed weights in exact integer arithmetic.
 *
 * The values of 4-bit formats, of INT8 and of 6-bit floats are whole numbers times a power of two.
 * A token is a row of such whole numbers n, stored as n + offset in one to three planes of unsigned
 * bytes, the most significant first. Sums of products are exact in 32 bits, because no segment of
 * a row is long enough to overflow (integer_ops.py chooses its length). What is rounded is one fused
 * product with the scale and addition per segment, in one order, so that every instruction set and
 * every number of threads gives the same bits.
 *
 * The module has no Python API. integer_ops.py calls its functions through ctypes.
 */
#include <math.h>

#include "kernel_utils.h"

#define CHUNK 4096 /* values that are quantized at a time */
#define PANEL 64 /* rows of the weight that are expanded at a time */
#define MOST_ROWS 32 /* of a tile */

/* Tokens, quantized: m rows of k whole numbers. Numbers and scales are shared by `group` columns. */
typedef struct {
    int64_t m, k, group;
    int32_t planes, offset;
    uint8_t *numbers; /* planes x m x k */
    float *scale;     /* m x k / group */
    int32_t *zero;    /* m x k / group: what is subtracted from numbers instead of offset; or NULL */
} Tokens;

/* A packed weight: n rows of k codes of 4 or 8 bits. */
typedef struct {
    int64_t n, k, group;
    int32_t bits;
    int32_t scale_bytes; /* 1: an index into scale_values, 2: fp16, 4: fp32 */
    const uint8_t *codes;
    const int8_t *tables;       /* 4 bits: 256 pairs of values by byte; 8 bits: 256 values by code */
    const uint8_t *table_index; /* n x k / group: which table; or NULL */
    const uint8_t *scales;      /* n x k / group */
    const float *scale_values;  /* 256 for each table, or for all tables if they share it */
    const float *factors;       /* for each table: what its values are multiplied by */
    int64_t scale_values_stride;
} Weight;

/* PANEL rows of a weight, expanded. */
typedef struct {
    int64_t segment;
    int8_t *weight;      /* k / 4 x PANEL x 4 */
    int32_t *correction; /* k / segment x PANEL */
    float *scale;        /* k / segment x PANEL */
} Panel;

typedef struct Kernel Kernel;

typedef struct {
    const Tokens *x;
    const Weight *w;
    const Kernel *kernel;
    int64_t segment;  /* columns whose products are summed up in whole numbers */
    const void *bias; /* n values of the output's type, or NULL */
    void *y;          /* m x n */
    int32_t dtype;
    int32_t failed;
} Product;

/* Multiplies `rows` tokens by `columns` rows of the weight, whose segments are multiples of `step`. */
typedef struct Tile {
    void (*multiply)(const Tokens *, int64_t row, const Panel *, int64_t first, float *y);
    int64_t rows, columns, step;
    const struct Tile *rest; /* for fewer tokens, and other segments */
} Tile;

struct Kernel {
    const char *name;
    const Tile *tile;
    void (*sum)(const int8_t *weight, int64_t count, int32_t *sums);
    void (*expand)(const uint8_t *codes, int64_t rows, int64_t k, int bits, const int8_t *table,
                   int8_t *weight);
    void (*store)(const Product *, int64_t row, int64_t rows, int64_t first, const float *total);
    int32_t is_signed; /* whether the tile subtracts 128 from each byte */
    /* Sets up the registers of a thread, of which it writes 64 bytes, and gives them back; or NULL. */
    void (*begin)(void *before);
    void (*end)(const void *before);
};

static int64_t greatest_common_divisor(int64_t a, int64_t b) {
    while (b) {
        int64_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}

/* Reads an fp16 number, subnormal or not. */
static inline float read_float16(const uint8_t *x) {
    const uint32_t half = (uint32_t)(x[0] | x[1] << 8), bits = (half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    if ((half & 0x7c00) == 0x7c00) value = half & 0x3ff ? NAN : INFINITY;
    return half >> 15 ? -value : value;
}

/* Scales the totals of some tokens, adds the bias, and stores them. */
ALWAYS_INLINE void store_rows(const Product *p, int64_t row, int64_t rows, int64_t first, const float *total) {
    const int64_t n = p->w->n, columns = n - first < PANEL ? n - first : PANEL;
    for (int64_t r = 0; r < rows; r++) {
        float y[PANEL];
        memcpy(y, total + r * PANEL, sizeof y);
        if (p->x->group == p->x->k)
            for (int j = 0; j < PANEL; j++) y[j] *= p->x->scale[row + r];
        const int64_t place = (row + r) * n + first;
        if (p->dtype == FLOAT32) {
            if (p->bias)
                for (int64_t j = 0; j < columns; j++) y[j] += ((const float *)p->bias)[first + j];
            memcpy((float *)p->y + place, y, (size_t)columns * 4);
        } else {
            if (p->bias)
                for (int64_t j = 0; j < columns; j++)
                    y[j] += read_bfloat16(((const uint16_t *)p->bias)[first + j]);
            for (int64_t j = 0; j < columns; j++)
                ((uint16_t *)p->y)[place + j] = round_to_bfloat16(y[j]);
        }
    }
}

/* ---- The instruction sets. ---- */

#define EACH_COLUMN_2(M, r) M(r, 0) M(r, 1)
#define EACH_COLUMN_4(M, r) M(r, 0) M(r, 1) M(r, 2) M(r, 3)
#define EACH_2(M) M(0) M(1)
#define EACH_4(M) M(0) M(1) M(2) M(3)
#define TILE_1(M, COLUMN) COLUMN(M, 0)
#define TILE_4(M, COLUMN) COLUMN(M, 0) COLUMN(M, 1) COLUMN(M, 2) COLUMN(M, 3)
#define TILE_6(M, COLUMN) TILE_4(M, COLUMN) COLUMN(M, 4) COLUMN(M, 5)
#define ROWS_1(M) M(0)
#define ROWS_4(M) M(0) M(1) M(2) M(3)
#define ROWS_6(M) ROWS_4(M) M(4) M(5)

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FLIP 0u
#define UNFLIP 0
#define LANES 16
#define COLUMNS 4
#define EACH_COLUMN EACH_COLUMN_4
#define EACH_VECTOR EACH_4
#define vint vint16
#define vfloat vfloat16
#define vbyte vbyte16
typedef uint32_t vint16 __attribute__((vector_size(64), may_alias));
typedef int8_t vbyte16 __attribute__((vector_size(64), may_alias));
typedef float vfloat16 __attribute__((vector_size(64), may_alias));
#define REPEAT_TABLE(table) \
    (vint)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(table)))
#define LOOK_UP(values, index) (vint)_mm512_shuffle_epi8((__m512i)(values), (__m512i)(index))
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define FMA(x, y, z) (vfloat)_mm512_fmadd_ps((__m512)(x), (__m512)(y), (__m512)(z))
/* gcc 12 keeps the sums of the intrinsic in memory. */
#define DOT(sum, token, weight) \
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(token), "v"(weight));
#define NAME tile_avx512
#define ROWS 6
#define EACH_ROW ROWS_6
#define EACH(M) TILE_6(M, EACH_COLUMN_4)
#include "integer_tile.h"
#define NAME row_avx512
#define SUM_NAME sum_avx512
#define STORE_NAME store_avx512
#define EXPAND_NAME expand_avx512
#define ROWS 1
#define EACH_ROW ROWS_1
#define EACH(M) TILE_1(M, EACH_COLUMN_4)
#include "integer_tile.h"
#undef LANES
#undef COLUMNS
#undef EACH_COLUMN
#undef EACH_VECTOR
#undef vint
#undef vfloat
#undef vbyte
#undef REPEAT_TABLE
#undef LOOK_UP
#undef FMA
#undef TARGET
#undef DOT

#define LANES 8
#define COLUMNS 2
#define EACH_COLUMN EACH_COLUMN_2
#define EACH_VECTOR EACH_2
#define vint vint8
#define vfloat vfloat8
#define vbyte vbyte8
typedef uint32_t vint8 __attribute__((vector_size(32), may_alias));
typedef int8_t vbyte8 __attribute__((vector_size(32), may_alias));
typedef float vfloat8 __attribute__((vector_size(32), may_alias));
#define REPEAT_TABLE(table) \
    (vint)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table)))
#define LOOK_UP(values, index) (vint)_mm256_shuffle_epi8((__m256i)(values), (__m256i)(index))
#define FMA(x, y, z) (vfloat)_mm256_fmadd_ps((__m256)(x), (__m256)(y), (__m256)(z))
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define DOT(sum, token, weight) \
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(token), "x"(weight));
#define NAME tile_avxvnni
#define ROWS 6
#define EACH_ROW ROWS_6
#define EACH(M) TILE_6(M, EACH_COLUMN_2)
#include "integer_tile.h"
#define NAME row_avxvnni
#define SUM_NAME sum_avxvnni
#define STORE_NAME store_avxvnni
#define EXPAND_NAME expand_avxvnni
#define ROWS 1
#define EACH_ROW ROWS_1
#define EACH(M) TILE_1(M, EACH_COLUMN_2)
#include "integer_tile.h"
#undef TARGET
#undef DOT

/* Without VNNI two products are added in 16 bits, where 2 x 255 x 127 would saturate. The token is
 * therefore split into its lowest bit and the 7 bits above it. */
#define TARGET __attribute__((target("avx2,fma")))
#define DOT(sum, token, weight)                                                                  \
    {                                                                                            \
        const __m256i t = (__m256i)(token), w = (__m256i)(weight);                               \
        const __m256i low = _mm256_and_si256(t, _mm256_set1_epi8(1));                            \
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(t, 1), _mm256_set1_epi8(127));   \
        sum += (vint)_mm256_madd_epi16(_mm256_maddubs_epi16(high, w), _mm256_set1_epi16(2)) +    \
               (vint)_mm256_madd_epi16(_mm256_maddubs_epi16(low, w), _mm256_set1_epi16(1));      \
    }
#define NAME tile_avx2_wide
#define ROWS 4
#define EACH_ROW ROWS_4
#define EACH(M) TILE_4(M, EACH_COLUMN_2)
#include "integer_tile.h"
#define NAME row_avx2_wide
#define SUM_NAME sum_avx2_wide
#define STORE_NAME store_avx2_wide
#define EXPAND_NAME expand_avx2_wide
#define ROWS 1
#define EACH_ROW ROWS_1
#define EACH(M) TILE_1(M, EACH_COLUMN_2)
#include "integer_tile.h"
#undef DOT
/* Weights of at most 64: 2 x 255 x 64 fits 16 bits. */
#define DOT(sum, token, weight)                                                        \
    sum += (vint)_mm256_madd_epi16(                                                    \
        _mm256_maddubs_epi16((__m256i)(token), (__m256i)(weight)), _mm256_set1_epi16(1));
#define NAME tile_avx2
#define ROWS 4
#define EACH_ROW ROWS_4
#define EACH(M) TILE_4(M, EACH_COLUMN_2)
#include "integer_tile.h"
#define NAME row_avx2
#define SUM_NAME sum_avx2
#define STORE_NAME store_avx2
#define EXPAND_NAME expand_avx2
#define ROWS 1
#define EACH_ROW ROWS_1
#define EACH(M) TILE_1(M, EACH_COLUMN_2)
#include "integer_tile.h"

#if __GNUC__ >= 11 || (defined(__clang__) && __clang_major__ >= 12) /* the compiler knows it */
#include "integer_amx.h"
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#define TILES(isa, most_rows, columns)                                               \
    static const Tile isa##_row = {row_##isa, 1, columns, 4, NULL};                  \
    static const Tile isa##_tile = {tile_##isa, most_rows, columns, 4, &isa##_row};
#define KERNEL(name, isa) {name, &isa##_tile, sum_##isa, expand_##isa, store_##isa, 0, NULL, NULL}
TILES(avx512, 6, 64)
TILES(avxvnni, 6, 16)
TILES(avx2, 4, 16)
TILES(avx2_wide, 4, 16)
#if HAS_AMX
static const Tile amx_tile = {tile_amx, AMX_SIDE, PANEL, AMX_STEP, &avx512_tile};
#endif

static const Kernel kernels[] = {
#if HAS_AMX
    {"amx", &amx_tile, sum_avx512, expand_avx512, store_avx512, 0, begin_amx, end_amx},
#else
    {0},
#endif
    KERNEL("avx512vnni", avx512), KERNEL("avxvnni", avxvnni), KERNEL("avx2", avx2),
    KERNEL("avx2_wide", avx2_wide),
};

static void read_cpuid(unsigned leaf, unsigned subleaf, unsigned *eax, unsigned *edx) {
    unsigned ebx, ecx; /* gcc 12 has no names for AMX and AVX-VNNI in __builtin_cpu_supports */
    __asm__("cpuid" : "=a"(*eax), "=b"(ebx), "=c"(ecx), "=d"(*edx) : "a"(leaf), "c"(subleaf));
}

static int supports_avx512vnni(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

/* Asks the system, too, which lets a process use the tiles only on request. */
static int supports_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned eax, edx;
    read_cpuid(7, 0, &eax, &edx);
    const int has_tiles = edx >> 24 & 1, has_int8 = edx >> 25 & 1;
    if (!HAS_AMX || !has_tiles || !has_int8 || !supports_avx512vnni()) return 0;
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static int supports_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int is_supported(int kernel) {
    unsigned eax, edx;
    switch (kernel) {
    case 0:
        return supports_amx();
    case 1:
        return supports_avx512vnni();
    case 2:
        read_cpuid(7, 1, &eax, &edx);
        return supports_avx2() && (eax >> 4 & 1);
    default:
        return supports_avx2();
    }
}

#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>

#define FLIP 0x80808080u /* sdot multiplies signed bytes */
#define UNFLIP 0x808080 /* what this subtracts from a number of three bytes */
#define LANES 4
#define COLUMNS 4
#define EACH_COLUMN EACH_COLUMN_4
#define EACH_VECTOR EACH_4
#define vint vint4
#define vfloat vfloat4
#define vbyte vbyte4
typedef uint32_t vint4 __attribute__((vector_size(16), may_alias));
typedef int8_t vbyte4 __attribute__((vector_size(16), may_alias));
typedef float vfloat4 __attribute__((vector_size(16), may_alias));
#define REPEAT_TABLE(table) (vint)vld1q_s8(table)
#define LOOK_UP(values, index) (vint)vqtbl1q_s8((int8x16_t)(values), (uint8x16_t)(index))
/* gcc and clang differ in the name of the target, and clang 14 hides its intrinsic without it. */
#if defined(__ARM_FEATURE_DOTPROD)
#define TARGET
#elif defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define FMA(x, y, z) (vfloat)vfmaq_f32((float32x4_t)(z), (float32x4_t)(x), (float32x4_t)(y))
#define DOT(sum, token, weight) \
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(token), "w"(weight));
#define NAME tile_dotprod
#define ROWS 4
#define EACH_ROW ROWS_4
#define EACH(M) TILE_4(M, EACH_COLUMN_4)
#include "integer_tile.h"
#define NAME row_dotprod
#define SUM_NAME sum_dotprod
#define STORE_NAME store_dotprod
#define EXPAND_NAME expand_dotprod
#define ROWS 1
#define EACH_ROW ROWS_1
#define EACH(M) TILE_1(M, EACH_COLUMN_4)
#include "integer_tile.h"

static const Tile dotprod_row = {row_dotprod, 1, 16, 4, NULL};
static const Tile dotprod_tile = {tile_dotprod, 4, 16, 4, &dotprod_row};
static const Kernel kernels[] = {{"dotprod", &dotprod_tile, sum_dotprod, expand_dotprod, store_dotprod, 1, NULL, NULL}};

static int is_supported(int kernel) {
    return kernel == 0 && (getauxval(AT_HWCAP) & (1 << 20)) != 0; /* HWCAP_ASIMDDP */
}

#else
static const Kernel kernels[] = {{0}};
static int is_supported(int kernel) { return 0; }
#endif

enum { NUM_KERNELS = sizeof kernels / sizeof *kernels };

/* Returns the name of a kernel, or NULL if this processor cannot run it or there is none. */
const char *fp4dit_kernel_name(int kernel) {
    return kernel >= 0 && kernel < NUM_KERNELS && is_supported(kernel) ? kernels[kernel].name : NULL;
}

/* ---- The product. ---- */

static void *allocate(int64_t size) { return aligned_alloc(64, (size_t)((size + 63) / 64 * 64)); }

/* Expands codes by several tables, or of 8 bits, one by one. */
static void expand_by_tables(const Weight *w, int64_t first, int64_t rows, int8_t *weight) {
    const int64_t k = w->k, groups = k / w->group, row_bytes = k * w->bits / 8;
    const int64_t table_size = w->bits == 4 ? 512 : 256;
    /* Few columns at a time, so that the panel's lines stay in the cache until they are full. */
    const int64_t piece = greatest_common_divisor(w->group, 64);
    for (int64_t start = 0; start < k; start += piece) {
        for (int64_t j = 0; j < rows; j++) {
            const uint8_t *codes = w->codes + (first + j) * row_bytes + start * w->bits / 8;
            const int64_t block = (first + j) * groups + start / w->group;
            const int8_t *table = w->tables + (w->table_index ? w->table_index[block] : 0) * table_size;
            int8_t *out = weight + start * PANEL + 4 * j;
            if (w->bits == 4) {
                for (int64_t i = 0; i < piece; i += 4, codes += 2, out += 4 * PANEL) {
                    memcpy(out, table + 2 * codes[0], 2);
                    memcpy(out + 2, table + 2 * codes[1], 2);
                }
            } else {
                for (int64_t i = 0; i < piece; i += 4, codes += 4, out += 4 * PANEL)
                    for (int c = 0; c < 4; c++) out[c] = table[codes[c]];
            }
        }
    }
}

/* Expands rows `first` to `first + PANEL` of the weight. Rows beyond the end have scale 0. */
static void expand_panel(const Product *p, int64_t first, Panel *panel) {
    const Weight *w = p->w;
    const int64_t k = w->k, groups = k / w->group;
    const int64_t rows = w->n - first < PANEL ? w->n - first : PANEL;
    if (!w->table_index && k % 8 == 0) {
        int8_t values[16];
        for (int code = 0; code < 16; code++) values[code] = w->tables[2 * code];
        p->kernel->expand(w->codes + first * k * w->bits / 8, rows, k, w->bits, values, panel->weight);
    } else {
        if (rows < PANEL) memset(panel->weight, 0, (size_t)(k * PANEL));
        expand_by_tables(w, first, rows, panel->weight);
    }
    const int64_t segments = w->group / p->segment; /* of a group */
    memset(panel->scale, 0, (size_t)(groups * segments * PANEL * 4));
    for (int64_t j = 0; j < rows; j++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t block = (first + j) * groups + g;
            const int64_t table = w->table_index ? w->table_index[block] : 0;
            float scale;
            if (w->scale_bytes == 1)
                scale = w->scale_values[table * w->scale_values_stride + w->scales[block]];
            else if (w->scale_bytes == 2)
                scale = read_float16(w->scales + 2 * block);
            else
                memcpy(&scale, w->scales + 4 * block, 4);
            scale *= w->factors[table];
            for (int64_t s = g * segments; s < (g + 1) * segments; s++) panel->scale[s * PANEL + j] = scale;
        }
    }
}

/* Computes what is added to the sums of each segment because tokens are stored with an offset. */
static void compute_correction(const Product *p, Panel *panel) {
    uint32_t factor = (uint32_t)p->x->offset; /* modulo 2^32, as the sums */
    if (p->x->zero)
        factor = 1;
    else if (p->kernel->is_signed)
        factor -= 0x808080u & ((1u << 8 * p->x->planes) - 1);
    for (int64_t s = 0; s < p->w->k / panel->segment; s++) {
        int32_t *correction = panel->correction + s * PANEL;
        p->kernel->sum(panel->weight + s * panel->segment * PANEL, panel->segment, correction);
        for (int j = 0; j < PANEL; j++) correction[j] = (int32_t)-(factor * (uint32_t)correction[j]);
    }
}

static void multiply_panels(void *task, int64_t first_panel, int64_t last_panel) {
    Product *p = task;
    const Kernel *kernel = p->kernel;
    const int64_t m = p->x->m, k = p->w->k, segments = k / p->segment;
    Panel panel = {p->segment, allocate(k * PANEL), allocate(segments * PANEL * 4),
                   allocate(segments * PANEL * 4)};
    float total[MOST_ROWS * PANEL] __attribute__((aligned(64)));
    uint8_t before[64]; /* the size of AMX's configuration */
    if (panel.weight && panel.correction && panel.scale) {
        if (kernel->begin) kernel->begin(before);
        for (int64_t i = first_panel; i < last_panel; i++) {
            expand_panel(p, i * PANEL, &panel);
            compute_correction(p, &panel);
            for (int64_t row = 0; row < m;) {
                const Tile *tile = kernel->tile;
                while (row + tile->rows > m || panel.segment % tile->step) tile = tile->rest;
                for (int64_t j = 0; j < PANEL; j += tile->columns)
                    tile->multiply(p->x, row, &panel, j, total);
                kernel->store(p, row, tile->rows, i * PANEL, total);
                row += tile->rows;
            }
        }
        if (kernel->end) kernel->end(before);
    } else {
        p->failed = 1;
    }
    free(panel.weight), free(panel.correction), free(panel.scale);
}

/* Computes y = x W^T + bias. Returns 0, or 1 if there is not enough memory. */
int fp4dit_multiply(int kernel, const Tokens *x, const Weight *w, int64_t segment, const void *bias,
                    int dtype, void *y, int threads) {
    Product product = {x, w, &kernels[kernel], segment, bias, y, dtype, 0};
    run_parallel(multiply_panels, &product, (w->n + PANEL - 1) / PANEL, threads);
    return product.failed;
}

/* ---- Tokens. ---- */

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

ALWAYS_INLINE Divisor make_divisor(float scale, int is_safe) {
    return (Divisor){scale, 1.0f / scale, is_safe && scale >= 1.0f / SAFE && scale <= SAFE};
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

/* The arrays that the scales of some blocks are chosen with: a number for each, except `squares`. */
typedef struct {
    float *scale, *ideal, *candidate, *error, *least;
    int32_t *is_close;
    float *squares; /* of the errors of all values, and half as many of their sums */
} Scratch;

/* Computes for each block the sum of its values' squared errors with the candidate scale. */
ALWAYS_INLINE void sum_squared_errors(const Rounding *r, const float *x, int64_t blocks, int64_t count,
                                      const Scratch *s, int is_safe) {
    const Format format = r->format;
    float *squares = s->squares, *sums = squares + blocks * count;
    for (int64_t b = 0; b < blocks; b++) {
        const Divisor by = make_divisor(s->candidate[b], is_safe);
        const float *block = x + b * count;
        float *square = squares + b * count;
        if (by.is_inverted)
            for (int64_t i = 0; i < count; i++)
                square[i] = square_error(&format, block[i], divide_by_inverse(block[i], by), by.scale);
        else
            for (int64_t i = 0; i < count; i++)
                square[i] = square_error(&format, block[i], block[i] / by.scale, by.scale);
    }
    /* Neighbours are added until there is one sum for each block, or an odd number. */
    int64_t width = count;
    for (; width % 2 == 0; width /= 2) {
#pragma omp simd
        for (int64_t i = 0; i < blocks * width / 2; i++) sums[i] = squares[2 * i] + squares[2 * i + 1];
        float *swap = squares;
        squares = sums, sums = swap;
    }
    for (int64_t b = 0; b < blocks; b++) {
        s->error[b] = squares[b * width];
        for (int64_t i = 1; i < width; i++) s->error[b] += squares[b * width + i];
    }
}

/* Each step is a loop over all blocks, because the steps of one block wait for each other. */
ALWAYS_INLINE void choose_best_scales(const Rounding *r, const float *x, int64_t blocks, int64_t count,
                                      const Scratch *s, uint8_t *undecided, int is_safe) {
    for (int64_t b = 0; b < blocks; b++) s->ideal[b] = s->scale[b] / r->format.largest / r->tensor_scale;
    for (int i = 0; i < r->num_ratios; i++) {
        for (int64_t b = 0; b < blocks; b++)
            s->candidate[b] = round_scale(&r->scales, r->ratios[i] * s->ideal[b]) * r->tensor_scale;
        if (r->num_ratios > 1) sum_squared_errors(r, x, blocks, count, s, is_safe);
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
                                const Scratch *s, uint8_t *undecided, int has_fma) {
    int is_safe = has_fma;
    for (int64_t b = 0; b < blocks; b++) s->scale[b] = find_absmax(x + b * count, count);
    for (int64_t b = 0; b < blocks; b++) is_safe &= s->scale[b] <= SAFE;
    if (r->rule == ABSMAX)
        for (int64_t b = 0; b < blocks; b++)
            s->scale[b] = round_scale(&r->scales, s->scale[b] / r->format.largest);
    else if (r->rule == E8M0_EVEN)
        for (int64_t b = 0; b < blocks; b++) s->scale[b] = find_power_of_two(&r->format, s->scale[b]);
    else
        choose_best_scales(r, x, blocks, count, s, undecided, is_safe);
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
                                int64_t count, const Scratch *s, int has_fma) {
    const Rounding *r = q->rounding;
    int is_safe = 0;
    if (r->rule != GIVEN)
        is_safe = choose_scales(r, x, blocks, count, s, r->undecided ? r->undecided + first : NULL, has_fma);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t place = (first + b) * r->scale_stride;
        const float scale = r->rule == GIVEN ? r->scale[place] : s->scale[b];
        const float zero = r->zero ? r->zero[place] : 0.0f;
        float *block = x + b * count;
        const int is_valid = round_block(&r->format, block, count, make_divisor(scale, is_safe), zero);
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
                                  const Scratch *s, int has_fma) {
    const Rounding *r = q->rounding;
    const int64_t start = first * q->group, count = blocks * q->group;
    if (r->dtype == FLOAT32)
        memcpy(x, (const float *)q->x + start, (size_t)count * 4);
    else
        for (int64_t i = 0; i < count; i++) x[i] = read_bfloat16(((const uint16_t *)q->x)[start + i]);
    switch (q->group) { /* short blocks of a known length become a few vectors */
    case 16: round_blocks(q, first, blocks, x, 16, s, has_fma); break;
    case 32: round_blocks(q, first, blocks, x, 32, s, has_fma); break;
    case 64: round_blocks(q, first, blocks, x, 64, s, has_fma); break;
    default: round_blocks(q, first, blocks, x, q->group, s, has_fma);
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
    float *x = allocate((6 * most + count + count + count / 2) * 4);
    if (!x) {
        q->failed = 1;
        return;
    }
    float *arrays = x + count;
    const Scratch scratch = {arrays,
                             arrays + most,
                             arrays + 2 * most,
                             arrays + 3 * most,
                             arrays + 4 * most,
                             (int32_t *)(arrays + 5 * most),
                             arrays + 6 * most};
    for (int64_t b = first; b < last; b += most)
        quantize_chunk(q, b, b + most < last ? most : last - b, x, &scratch, has_fma);
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
