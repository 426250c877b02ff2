/* What the two C files of the GPTQ kernel share: packed weights, the thread pool's entry, vectors of eight.

The layout is our own (loaders/_gptq_cpu.py writes it). Outputs lie in panels of 8, inputs in blocks of 32; a block of a panel is
`bits` vectors of 32 bytes. Four neighbouring inputs of one output fill one 32-bit lane, so that a quad of int8 activations is
broadcast once for 8 outputs and no sum ever crosses lanes. */
#ifndef GPTQ_KERNEL_H
#define GPTQ_KERNEL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PANEL 8
#define BLOCK 32
#define SMALL_WORK (1 << 19) /* multiplications below which waking the other threads costs more than they bring */
#define INLINE static inline __attribute__((always_inline))

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

/* One linear layer. w = scale[g] * (code - zero[g]); group g ends before block group_end[g]. */
typedef struct {
    int32_t bits;         /* 2, 3, 4, 8 */
    int32_t n, k;         /* outputs, inputs */
    int32_t blocks;       /* blocks of 32 inputs, padding included */
    int32_t groups;
    int32_t half_scales;  /* scales are float16, else float32 */
    int32_t zero_kind;    /* 0: `zero` for all; 1: bytes; 2: float32 */
    float zero;
    const uint8_t *codes;      /* [panels][blocks][bits * 32] */
    const void *scales;        /* [panels][groups][8] */
    const void *zeros;         /* [panels][groups][8] */
    const int32_t *group_end;  /* [groups] */
    const int32_t *perm;       /* [blocks * 32] input of each place, -1 for padding; NULL: in order */
    const float *bias;         /* [n] or NULL */
} Weights;

/* Activations made ready for layers of one order of inputs: codes with one scale for each block, or plain floats. */
typedef struct {
    int32_t stride, blocks, groups;
    int8_t *codes;   /* [m][stride] */
    float *steps;    /* [m][blocks] */
    float *values;   /* [m][stride], exact mode */
    float *sums;     /* [m][groups], of the rounded values */
} Rows;

typedef void (*Task)(void *context, int index);

/* task(context, 0 ... count-1) on the threads of the OpenMP runtime that torch has loaded. */
void parallel(Task task, void *context, int count);

/* Several layers on the same rows. Returns 0, or -1 when memory ran out. */
int linears(const Weights *const *layers, int count, const float *x, int m, float *const *outputs, int exact);

INLINE f32x8 load8(const float *at) { f32x8 v; memcpy(&v, at, sizeof v); return v; }
INLINE void store8(float *at, f32x8 v) { memcpy(at, &v, sizeof v); }
INLINE f32x8 all8(float value) { return (f32x8){value, value, value, value, value, value, value, value}; }
INLINE int least(int a, int b) { return a < b ? a : b; }

#endif
