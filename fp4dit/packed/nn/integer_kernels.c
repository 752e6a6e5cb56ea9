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

#define PANEL 64 /* rows of the weight that are expanded at a time */
#define MOST_ROWS 96 /* tokens that are multiplied by a panel at a time */

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
    int8_t *weight;      /* PANEL / columns of the tile x k / 4 x columns of the tile x 4 */
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
    void (*sum)(const int8_t *weight, int64_t k, int64_t start, int64_t count, int32_t *sums);
    void (*expand)(const uint8_t *codes, int64_t rows, int64_t k, int bits, const int8_t *table,
                   int8_t *weight);
    void (*store)(const Product *, int64_t row, int64_t rows, int64_t first, const float *total);
    int32_t is_signed; /* whether the tile subtracts 128 from each byte */
    int32_t largest_weight; /* magnitude that its sums hold */
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
            if (columns == PANEL) /* a known size takes no call */
                memcpy((float *)p->y + place, y, sizeof y);
            else
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

#define CONCATENATE_NAMES(x, y) x##y
#define CONCATENATE(x, y) CONCATENATE_NAMES(x, y)
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
#undef DOT
/* Weights of at most 16: 4 x 2 x 255 x 16 fits 16 bits. */
#define PAIRS
#define STEP 16
/* gcc 12 would reorder the sums of the intrinsics, and keep them in memory. */
#define DOT(pairs, token, weight)                                           \
    {                                                                       \
        vint product;                                                       \
        __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"                \
                : "+x"(pairs), "=&x"(product) : "x"(token), "x"(weight));   \
    }
#define ADD_PAIRS(sum, pairs) sum += (vint)_mm256_madd_epi16((__m256i)(pairs), _mm256_set1_epi16(1));
#define NAME tile_avx2_narrow
#define ROWS 4
#define EACH_ROW ROWS_4
#define EACH(M) TILE_4(M, EACH_COLUMN_2)
#include "integer_tile.h"
#undef PAIRS

#if __GNUC__ >= 11 || (defined(__clang__) && __clang_major__ >= 12) /* the compiler knows it */
#include "integer_amx.h"
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#define TILES(isa, most_rows, columns)                                               \
    static const Tile isa##_row = {row_##isa, 1, columns, 4, NULL};                  \
    static const Tile isa##_tile = {tile_##isa, most_rows, columns, 4, &isa##_row};
#define KERNEL(name, isa, tile, largest) \
    {name, &tile, sum_##isa, expand_##isa, store_##isa, 0, largest, NULL, NULL}
TILES(avx512, 6, 64)
TILES(avxvnni, 6, 16)
TILES(avx2, 4, 16)
TILES(avx2_wide, 4, 16)
static const Tile avx2_narrow_tile = {tile_avx2_narrow, 4, 16, STEP, &avx2_tile};
#if HAS_AMX
static const Tile amx_tile = {tile_amx, AMX_SIDE, PANEL, AMX_STEP, &avx512_tile};
#endif

static const Kernel kernels[] = {
#if HAS_AMX
    {"amx", &amx_tile, sum_avx512, expand_avx512, store_avx512, 0, 127, begin_amx, end_amx},
#else
    {0},
#endif
    KERNEL("avx512vnni", avx512, avx512_tile, 127),
    KERNEL("avxvnni", avxvnni, avxvnni_tile, 127),
    KERNEL("avx2_narrow", avx2, avx2_narrow_tile, 16),
    KERNEL("avx2", avx2, avx2_tile, 64),
    KERNEL("avx2_wide", avx2_wide, avx2_wide_tile, 127),
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
static const Kernel kernels[] = {{"dotprod", &dotprod_tile, sum_dotprod, expand_dotprod, store_dotprod, 1, 127, NULL, NULL}};

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

/* Returns the largest magnitude of the weights that a kernel multiplies. */
int fp4dit_kernel_largest_weight(int kernel) { return kernels[kernel].largest_weight; }

/* ---- The product. ---- */

static void *allocate(int64_t size) { return aligned_alloc(64, (size_t)((size + 63) / 64 * 64)); }

/* Expands codes by several tables, or of 8 bits, one by one. */
static void expand_by_tables(const Weight *w, int64_t first, int64_t rows, int64_t width, int8_t *weight) {
    const int64_t k = w->k, groups = k / w->group, row_bytes = k * w->bits / 8;
    const int64_t table_size = w->bits == 4 ? 512 : 256;
    /* Few columns at a time, so that the panel's lines stay in the cache until they are full. */
    const int64_t piece = greatest_common_divisor(w->group, 64);
    for (int64_t start = 0; start < k; start += piece) {
        for (int64_t j = 0; j < rows; j++) {
            const uint8_t *codes = w->codes + (first + j) * row_bytes + start * w->bits / 8;
            const int64_t block = (first + j) * groups + start / w->group;
            const int8_t *table = w->tables + (w->table_index ? w->table_index[block] : 0) * table_size;
            int8_t *out = weight + j / width * width * k + start * width + 4 * (j % width);
            if (w->bits == 4) {
                for (int64_t i = 0; i < piece; i += 4, codes += 2, out += 4 * width) {
                    memcpy(out, table + 2 * codes[0], 2);
                    memcpy(out + 2, table + 2 * codes[1], 2);
                }
            } else {
                for (int64_t i = 0; i < piece; i += 4, codes += 4, out += 4 * width)
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
        expand_by_tables(w, first, rows, p->kernel->tile->columns, panel->weight);
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
        p->kernel->sum(panel->weight, p->w->k, s * panel->segment, panel->segment, correction);
        for (int j = 0; j < PANEL; j++) correction[j] = (int32_t)-(factor * (uint32_t)correction[j]);
    }
}

/* Multiplies some tokens by a panel. A tile's columns stay in the nearest cache for all of them. */
static void multiply_rows(const Product *p, int64_t first, int64_t rows, int64_t place, const Panel *panel) {
    const Kernel *kernel = p->kernel;
    float total[MOST_ROWS * PANEL] __attribute__((aligned(64)));
    for (int64_t j = 0; j < PANEL; j += kernel->tile->columns) {
        for (int64_t row = 0; row < rows;) {
            const Tile *tile = kernel->tile;
            while (row + tile->rows > rows || panel->segment % tile->step) tile = tile->rest;
            tile->multiply(p->x, first + row, panel, j, total + row * PANEL);
            row += tile->rows;
        }
    }
    kernel->store(p, first, rows, place, total);
}

static void multiply_panels(void *task, int64_t first_panel, int64_t last_panel) {
    Product *p = task;
    const Kernel *kernel = p->kernel;
    const int64_t m = p->x->m, k = p->w->k, segments = k / p->segment;
    Panel panel = {p->segment, allocate(k * PANEL), allocate(segments * PANEL * 4),
                   allocate(segments * PANEL * 4)};
    uint8_t before[64]; /* the size of AMX's configuration */
    if (panel.weight && panel.correction && panel.scale) {
        if (kernel->begin) kernel->begin(before);
        for (int64_t i = first_panel; i < last_panel; i++) {
            expand_panel(p, i * PANEL, &panel);
            compute_correction(p, &panel);
            for (int64_t row = 0; row < m; row += MOST_ROWS)
                multiply_rows(p, row, m - row < MOST_ROWS ? m - row : MOST_ROWS, i * PANEL, &panel);
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

#include "integer_tokens.h"
