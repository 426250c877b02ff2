/* Products of rows with packed GPTQ weights on a CPU. Compiled on the user's machine by loaders/_gptq_build.py.

Two ways over the same packed weights. With int8 activations (one scale for 32 inputs, as llama.cpp's Q8_0): AVX2's maddubs, or
dpbusd where the processor has it. Exact: float32 activations, codes turned to floats in registers; written in the compilers'
vector types, which is also the int8 way of every other processor. */
#include "_gptq_kernel.h"

#include <math.h>
#include <stdlib.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define AVX2 1
#endif
#if defined(AVX2) && (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))
#define VNNI 1
#endif
/* Without this gcc puts off the sums of all rows but one and spills every product to the stack: half the speed. */
#ifdef AVX2
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v) (void)0
#endif

#define ROW_BLOCK 64   /* rows whose activations stay in the second-level cache */
#define CHUNK 16       /* panels in one task */

/* --- threads ------------------------------------------------------------------------------------------------ */

typedef void (*GompParallel)(void (*)(void *), void *, unsigned, unsigned);
static GompParallel gomp;

/* libgomp's (or LLVM's) GOMP_parallel of the runtime that torch uses: a second pool would fight it for the cores. */
void gptq_use_threads(void *address) { memcpy(&gomp, &address, sizeof gomp); }

typedef struct { Task task; void *context; int next, count; } Work;

static void drain(void *pointer) {
    Work *work = pointer;
    for (;;) {
        int index = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (index >= work->count) return;
        work->task(work->context, index);
    }
}

void parallel(Task task, void *context, int count) {
    Work work = {task, context, 0, count};
    if (gomp && count > 1) gomp(drain, &work, 0, 0);
    else drain(&work);
}

/* --- numbers ------------------------------------------------------------------------------------------------ */

#ifndef AVX2
static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    float value;
    if (rest < 0x0400) { value = (float)rest * 0x1p-24f; memcpy(&bits, &value, 4); bits |= sign; }
    else bits = sign | (rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ff) << 13 : (rest << 13) + 0x38000000u);
    memcpy(&value, &bits, 4);
    return value;
}
#endif

INLINE f32x8 scales_of(const Weights *w, int64_t at) {
    if (!w->half_scales) return load8((const float *)w->scales + at);
    const uint16_t *half = (const uint16_t *)w->scales + at;
#ifdef AVX2
    return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half));
#else
    f32x8 v;
    for (int i = 0; i < 8; i++) v[i] = half_to_float(half[i]);
    return v;
#endif
}

INLINE f32x8 zeros_of(const Weights *w, int64_t at) {
    if (w->zero_kind == 0) return all8(w->zero);
    if (w->zero_kind == 2) return load8((const float *)w->zeros + at);
    u8x8 bytes;
    memcpy(&bytes, (const uint8_t *)w->zeros + at, sizeof bytes);
    return __builtin_convertvector(bytes, f32x8);
}

/* The codes of quad q (inputs 4q ... 4q+3 of the block), one per byte. Constant `bits` and `q` fold the branches away. */
INLINE u32x8 quad_codes(const uint8_t *at, int bits, int q) {
    u32x8 v, high;
    if (bits == 8) { memcpy(&v, at + 32 * q, 32); return v; }
    if (bits == 4) { memcpy(&v, at + 32 * (q / 2), 32); return (v >> (4 * (q & 1))) & 0x0f0f0f0fu; }
    memcpy(&v, at + 32 * (q / 4), 32);
    v = (v >> (2 * (q & 3))) & 0x03030303u;
    if (bits == 2) return v;
    memcpy(&high, at + 64, 32);
    return v | ((q < 2 ? high << (2 - q) : high >> (q - 2)) & 0x04040404u);
}

/* --- one panel by up to four rows --------------------------------------------------------------------------- */

#ifdef AVX2
/* Sums of code * activation over a block. Without dpbusd 8-bit codes are taken less 128 (the caller moves the zero point). */
INLINE void block_sums(const uint8_t *codes, const int8_t *x, int stride, int bits, int rows, __m256i *sum) {
    for (int r = 0; r < rows; r++) sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
        __m256i c = (__m256i)quad_codes(codes, bits, q);
#ifndef VNNI
        __m256i low = _mm256_xor_si256(c, _mm256_set1_epi8(-128)), size = _mm256_abs_epi8(low);
#endif
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + (int64_t)r * stride + 4 * q, 4);
            __m256i xs = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
            sum[r] = _mm256_dpbusd_avx_epi32(sum[r], c, xs);
#elif defined(VNNI)
            sum[r] = _mm256_dpbusd_epi32(sum[r], c, xs);
#else
            if (bits == 8) { /* pairs of codes * 127 would overflow 16 bits: magnitudes up to 128 do not */
                __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(xs, low));
                sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            } else /* 8 * 2 * 15 * 127 fits into 16 bits */
                sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(c, xs));
#endif
            KEEP(sum[r]);
        }
    }
#ifndef VNNI
    if (bits != 8)
        for (int r = 0; r < rows; r++) sum[r] = _mm256_madd_epi16(sum[r], _mm256_set1_epi16(1));
#endif
}
#endif

INLINE void block_int8(const uint8_t *codes, const Rows *x, int64_t row, int b, int bits, int rows, f32x8 *total) {
    const int8_t *at = x->codes + row * x->stride + b * BLOCK;
    const float *step = x->steps + row * x->blocks + b;
#ifdef AVX2
    __m256i sum[4];
    block_sums(codes, at, x->stride, bits, rows, sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        total[r] += (f32x8)_mm256_cvtepi32_ps(sum[r]) * all8(step[(int64_t)r * x->blocks]);
#else
    i32x8 sum[4] = {{0}};
    for (int q = 0; q < 8; q++) {
        u32x8 c = quad_codes(codes, bits, q);
        for (int j = 0; j < 4; j++) {
            i32x8 code = (i32x8)((c >> (8 * j)) & 0xffu);
            for (int r = 0; r < rows; r++) sum[r] += code * (int32_t)at[(int64_t)r * x->stride + 4 * q + j];
        }
    }
    for (int r = 0; r < rows; r++)
        total[r] += __builtin_convertvector(sum[r], f32x8) * all8(step[(int64_t)r * x->blocks]);
#endif
}

INLINE void block_exact(const uint8_t *codes, const Rows *x, int64_t row, int b, int bits, int rows, f32x8 *total) {
    const float *at = x->values + row * x->stride + b * BLOCK;
    const int chains = 4 / rows; /* one sum would wait for itself */
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
        u32x8 c = quad_codes(codes, bits, q);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            f32x8 code = __builtin_convertvector((i32x8)((c >> (8 * j)) & 0xffu), f32x8);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                f32x8 *sum = total + r * chains + j % chains;
                *sum += code * all8(at[(int64_t)r * x->stride + 4 * q + j]);
                KEEP(*sum);
            }
        }
    }
}

INLINE void tile(const Weights *w, const Rows *x, int panel, int64_t row, int bits, int rows, int exact, float *y) {
    const uint8_t *codes = w->codes + (int64_t)panel * w->blocks * bits * 32;
    const int64_t grid = (int64_t)panel * w->groups * PANEL;
    const int chains = exact ? 4 / rows : 1; /* sums for each row, four in all */
    f32x8 out[4];
    for (int r = 0; r < rows; r++) out[r] = all8(0);
    for (int g = 0, b = 0; g < w->groups; g++) {
        f32x8 total[4] = {all8(0), all8(0), all8(0), all8(0)};
        for (; b < w->group_end[g]; b++, codes += bits * 32) {
            if (exact) block_exact(codes, x, row, b, bits, rows, total);
            else block_int8(codes, x, row, b, bits, rows, total);
        }
        f32x8 scale = scales_of(w, grid + g * PANEL), zero = zeros_of(w, grid + g * PANEL);
#if defined(AVX2) && !defined(VNNI)
        if (bits == 8 && !exact) zero -= all8(128);
#endif
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            for (int c = 1; c < chains; c++) total[r * chains] += total[r * chains + c];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            out[r] += scale * (total[r * chains] - zero * all8(x->sums[(row + r) * x->groups + g]));
    }
    int first = panel * PANEL, width = least(PANEL, w->n - first);
    for (int r = 0; r < rows; r++) {
        float *to = y + (row + r) * w->n + first;
        if (width == PANEL) store8(to, w->bias ? out[r] + load8(w->bias + first) : out[r]);
        else
            for (int i = 0; i < width; i++) to[i] = out[r][i] + (w->bias ? w->bias[first + i] : 0);
    }
}

INLINE void rectangle(const Weights *w, const Rows *x, int first, int last, int top, int bottom, int bits, int exact, float *y) {
    for (int panel = first; panel < last; panel++) {
        int row = top;
        for (; row + 4 <= bottom; row += 4) tile(w, x, panel, row, bits, 4, exact, y);
        for (; row < bottom; row++) tile(w, x, panel, row, bits, 1, exact, y);
    }
}

#define WAY(BITS, NAME, EXACT)                                                                                        \
    static __attribute__((noinline)) void NAME(const Weights *w, const Rows *x, int first, int last, int top,         \
                                               int bottom, float *y) {                                               \
        rectangle(w, x, first, last, top, bottom, BITS, EXACT, y);                                                    \
    }
WAY(2, int8_2, 0) WAY(3, int8_3, 0) WAY(4, int8_4, 0) WAY(8, int8_8, 0)
WAY(2, exact_2, 1) WAY(3, exact_3, 1) WAY(4, exact_4, 1) WAY(8, exact_8, 1)
typedef void (*Way)(const Weights *, const Rows *, int, int, int, int, float *);
static const Way ways[2][9] = {
    {0, 0, int8_2, int8_3, int8_4, 0, 0, 0, int8_8},
    {0, 0, exact_2, exact_3, exact_4, 0, 0, 0, exact_8},
};

/* --- activations -------------------------------------------------------------------------------------------- */

/* 32 values -> codes in -127 ... 127; the step, and the sum of the codes. */
INLINE float round_block(const float *x, int8_t *codes, int32_t *sum) {
    float most = 0;
    for (int i = 0; i < BLOCK; i++) most = fmaxf(most, fabsf(x[i]));
    const float inverse = most > 0 ? 127.0f / most : 0;
    int32_t total = 0;
    for (int i = 0; i < BLOCK; i++) {
        int32_t code = (int32_t)(x[i] * inverse + 12582912.0f - 12582912.0f); /* 1.5 * 2^23: rounds to the nearest */
        codes[i] = (int8_t)code;
        total += code;
    }
    *sum = total;
    return most / 127.0f;
}

typedef struct { const Weights *w; const float *x; Rows rows; int exact; } Preparing;

static void prepare_row(void *pointer, int row) {
    Preparing *p = pointer;
    const Weights *w = p->w;
    const float *x = p->x + (int64_t)row * w->k;
    Rows *rows = &p->rows;
    for (int g = 0, b = 0; g < w->groups; g++) {
        float total = 0;
        for (; b < w->group_end[g]; b++) {
            float block[BLOCK];
            const int at = b * BLOCK;
            if (w->perm)
                for (int i = 0; i < BLOCK; i++) block[i] = w->perm[at + i] < 0 ? 0 : x[w->perm[at + i]];
            else
                for (int i = 0; i < BLOCK; i++) block[i] = x[at + i];
            if (p->exact) {
                memcpy(rows->values + (int64_t)row * rows->stride + at, block, sizeof block);
                for (int i = 0; i < BLOCK; i++) total += block[i];
            } else {
                int32_t sum;
                float step = round_block(block, rows->codes + (int64_t)row * rows->stride + at, &sum);
                rows->steps[(int64_t)row * rows->blocks + b] = step;
                total += step * (float)sum;
            }
        }
        rows->sums[(int64_t)row * rows->groups + g] = total;
    }
}

static void *buffer;
static size_t buffer_size;

static int reserve(size_t size) {
    if (size <= buffer_size) return 0;
    free(buffer);
    buffer = aligned_alloc(64, (size + 63) / 64 * 64);
    buffer_size = buffer ? size : 0;
    return buffer ? 0 : -1;
}

static int prepare(const Weights *w, const float *x, int m, int exact, Rows *rows) {
    const size_t stride = (size_t)w->blocks * BLOCK, count = (size_t)m;
    const size_t codes = count * stride * (exact ? 4 : 1);
    if (reserve(codes + 4 * count * ((size_t)w->blocks + (size_t)w->groups))) return -1;
    rows->stride = (int32_t)stride, rows->blocks = w->blocks, rows->groups = w->groups;
    rows->codes = buffer;
    rows->values = buffer;
    rows->steps = (float *)((char *)buffer + codes);
    rows->sums = rows->steps + count * (size_t)w->blocks;
    Preparing p = {w, x, *rows, exact};
    if (m >= 8) parallel(prepare_row, &p, m);
    else
        for (int row = 0; row < m; row++) prepare_row(&p, row);
    return 0;
}

/* --- the product -------------------------------------------------------------------------------------------- */

#define MOST 8
typedef struct {
    const Weights *layer[MOST];
    float *y[MOST];
    int start[MOST + 1]; /* first task of each layer */
    int count, m, row_blocks, exact;
    const Rows *rows;
} Product;

static void product_task(void *pointer, int index) {
    const Product *p = pointer;
    int i = 0;
    while (index >= p->start[i + 1]) i++;
    const Weights *w = p->layer[i];
    const int inner = index - p->start[i], chunk = inner / p->row_blocks, block = inner % p->row_blocks;
    const int panels = (w->n + PANEL - 1) / PANEL, top = block * ROW_BLOCK;
    ways[p->exact][w->bits](w, p->rows, chunk * CHUNK, least(panels, (chunk + 1) * CHUNK), top, least(p->m, top + ROW_BLOCK),
                            p->y[i]);
}

static int same_order(const Weights *a, const Weights *b) {
    return a->k == b->k && a->perm == b->perm && a->groups == b->groups && a->blocks == b->blocks &&
           !memcmp(a->group_end, b->group_end, sizeof(int32_t) * (size_t)a->groups);
}

int linears(const Weights *const *layers, int count, const float *x, int m, float *const *outputs, int exact) {
    for (int i = 0; i < count;) {
        Rows rows;
        Product p = {.m = m, .row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK, .exact = !!exact, .rows = &rows};
        if (prepare(layers[i], x, m, exact, &rows)) return -1;
        int64_t work = 0;
        do {
            work += (int64_t)m * layers[i]->n * layers[i]->k;
            const int panels = (layers[i]->n + PANEL - 1) / PANEL;
            p.layer[p.count] = layers[i];
            p.y[p.count] = outputs[i];
            p.start[p.count + 1] = p.start[p.count] + (panels + CHUNK - 1) / CHUNK * p.row_blocks;
            p.count++, i++;
        } while (i < count && p.count < MOST && same_order(layers[i - 1], layers[i]));
        if (work < SMALL_WORK)
            for (int task = 0; task < p.start[p.count]; task++) product_task(&p, task);
        else parallel(product_task, &p, p.start[p.count]);
    }
    return 0;
}

/* x [m][k] -> y [m][n]. Returns 0, or -1 when memory ran out. */
int gptq_linear(const Weights *layer, const float *x, int m, float *y, int exact) { return linears(&layer, 1, x, m, &y, exact); }

/* What this was compiled for. */
const char *gptq_instructions(void) {
#if defined(VNNI)
    return "AVX2 + VNNI";
#elif defined(AVX2)
    return "AVX2";
#else
    return "portable vectors";
#endif
}
