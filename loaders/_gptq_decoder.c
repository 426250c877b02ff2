/* A whole step of a Llama-like decoder over packed layers: at one token a time the calls between small operations cost more than
the operations. Same arithmetic as the model's own forward, all in float32 but for the activations' rounding in the int8 way.

Keys are kept transposed, [kv head][dim][capacity], values [kv head][capacity][dim]: both products of attention then run along
vectors with no sum across lanes. Capacities are odd multiples of 16, so that rows do not fall into the same cache sets. */
#include "_gptq_kernel.h"

#include <math.h>
#include <stdlib.h>

#define TILE 4      /* rows of attention at once: query heads that share a key head, and tokens */
#define SPAN 128    /* keys at once */
#define MOST_DIM 256

typedef struct {
    const Weights *q, *k, *v, *o, *gate, *up, *down;
    const float *norm1, *norm2; /* [hidden] */
    float *keys, *values;
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, dim, ffn, capacity, exact;
    float eps, scale;
    const Layer *layer;
    const float *norm; /* the last one */
    const Weights *head; /* NULL: hand out the normed states instead of logits */
    const float *cosines, *sines; /* [positions][dim] */
} Model;

typedef struct {
    const Model *model;
    const Layer *layer;
    const float *weight;   /* of the norm */
    float *h, *normed, *delta, *q, *k, *v, *att, *gate, *up;
    int m, position, tokens_per_task;
} Step;

INLINE f32x8 either(i32x8 mask, f32x8 yes, f32x8 no) {
    i32x8 a, b;
    memcpy(&a, &yes, sizeof a);
    memcpy(&b, &no, sizeof b);
    a = (a & mask) | (b & ~mask);
    memcpy(&yes, &a, sizeof yes);
    return yes;
}

/* e^x, held to what float32 can: 2^n * e^r with a polynomial of degree 6 (Cephes' coefficients); relative error about 1e-7. */
INLINE f32x8 exp8(f32x8 x) {
    x = either(x < all8(-87.0f), all8(-87.0f), x);
    x = either(x > all8(88.0f), all8(88.0f), x);
    f32x8 n = x * 1.44269504f + 12582912.0f - 12582912.0f;
    f32x8 r = x - n * 0.693359375f - n * -2.12194440e-4f;
    f32x8 p = all8(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32x8 bits = (__builtin_convertvector(n, i32x8) + 127) << 23;
    f32x8 power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

INLINE float across(f32x8 v) {
    float total = 0;
    for (int i = 0; i < 8; i++) total += v[i];
    return total;
}

static void each(Task task, Step *step, int count) {
    if (step->m >= 8) parallel(task, step, count);
    else
        for (int i = 0; i < count; i++) task(step, i);
}

/* h += delta; normed = h / rms(h) * weight */
static void norm_row(void *pointer, int row) {
    const Step *s = pointer;
    const int n = s->model->hidden;
    float *h = s->h + (int64_t)row * n, *to = s->normed + (int64_t)row * n;
    f32x8 squares = all8(0);
    for (int i = 0; i < n; i += 8) {
        f32x8 v = load8(h + i);
        if (s->delta) { v += load8(s->delta + (int64_t)row * n + i); store8(h + i, v); }
        squares += v * v;
    }
    const f32x8 factor = all8(1.0f / sqrtf(across(squares) / (float)n + s->model->eps));
    for (int i = 0; i < n; i += 8) store8(to + i, load8(s->weight + i) * (load8(h + i) * factor));
}

static void silu_row(void *pointer, int row) {
    const Step *s = pointer;
    const int n = s->model->ffn;
    float *gate = s->gate + (int64_t)row * n, *up = s->up + (int64_t)row * n;
    for (int i = 0; i < n; i += 8) {
        f32x8 g = load8(gate + i);
        store8(gate + i, g / (1.0f + exp8(-g)) * load8(up + i));
    }
}

static void turn(float *x, const float *cosines, const float *sines, int dim) {
    const int half = dim / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

/* Rotary positions of one token; its keys and values go into the cache. */
static void place_row(void *pointer, int row) {
    const Step *s = pointer;
    const Model *m = s->model;
    const int d = m->dim, at = s->position + row;
    const float *cosines = m->cosines + (int64_t)at * d, *sines = m->sines + (int64_t)at * d;
    for (int head = 0; head < m->heads; head++) turn(s->q + ((int64_t)row * m->heads + head) * d, cosines, sines, d);
    for (int head = 0; head < m->kv_heads; head++) {
        float *k = s->k + ((int64_t)row * m->kv_heads + head) * d;
        const float *v = s->v + ((int64_t)row * m->kv_heads + head) * d;
        turn(k, cosines, sines, d);
        for (int i = 0; i < d; i++) s->layer->keys[((int64_t)head * d + i) * m->capacity + at] = k[i];
        memcpy(s->layer->values + ((int64_t)head * m->capacity + at) * d, v, sizeof(float) * (size_t)d);
    }
}

typedef struct { const float *q[TILE]; float *out[TILE]; int limit[TILE]; } Tile;

/* scores[r][t] = q[r] . key[first + t] for 16 keys at a time */
INLINE void score_span(const Model *m, const float *keys, const Tile *tile, int rows, int first, int count,
                       float scores[TILE][SPAN]) {
    for (int t = 0; t < count; t += 16) {
        f32x8 low[TILE], high[TILE];
        for (int r = 0; r < rows; r++) low[r] = high[r] = all8(0);
        for (int i = 0; i < m->dim; i++) {
            const float *at = keys + (int64_t)i * m->capacity + first + t;
            const f32x8 a = load8(at), b = load8(at + 8);
            for (int r = 0; r < rows; r++) { low[r] += all8(tile->q[r][i]) * a; high[r] += all8(tile->q[r][i]) * b; }
        }
        for (int r = 0; r < rows; r++) {
            store8(scores[r] + t, low[r] * m->scale);
            store8(scores[r] + t + 8, high[r] * m->scale);
        }
    }
}

/* Attention of `rows` queries to one key head: span after span with a running maximum, as flash attention does. */
INLINE void attend(const Model *m, const float *keys, const float *values, const Tile *tile, int rows) {
    float scores[TILE][SPAN], most[TILE], total[TILE];
    int end = 0;
    for (int r = 0; r < rows; r++) {
        most[r] = -INFINITY, total[r] = 0;
        memset(tile->out[r], 0, sizeof(float) * (size_t)m->dim);
        end = tile->limit[r] > end ? tile->limit[r] : end;
    }
    for (int first = 0; first < end; first += SPAN) {
        const int count = least(SPAN, (end - first + 15) / 16 * 16);
        score_span(m, keys, tile, rows, first, count, scores);
        for (int r = 0; r < rows; r++) {
            const int seen = least(count, tile->limit[r] - first);
            float top = most[r];
            for (int t = 0; t < seen; t++) top = scores[r][t] > top ? scores[r][t] : top;
            const float shrink = most[r] == top ? 1.0f : expf(most[r] - top);
            f32x8 sum = all8(0);
            for (int t = 0; t < count; t += 8) {
                f32x8 p = exp8(load8(scores[r] + t) - top);
                p = either((i32x8){0, 1, 2, 3, 4, 5, 6, 7} + t < seen, p, all8(0));
                store8(scores[r] + t, p);
                sum += p;
            }
            most[r] = top;
            total[r] = total[r] * shrink + across(sum);
            for (int i = 0; i < m->dim; i += 8) store8(tile->out[r] + i, load8(tile->out[r] + i) * shrink);
        }
        const int last = least(count, end - first);
        for (int i = 0; i < m->dim; i += 8) {
            f32x8 sum[TILE];
            for (int r = 0; r < rows; r++) sum[r] = load8(tile->out[r] + i);
            for (int t = 0; t < last; t++) {
                const f32x8 v = load8(values + (int64_t)(first + t) * m->dim + i);
                for (int r = 0; r < rows; r++) sum[r] += all8(scores[r][t]) * v;
            }
            for (int r = 0; r < rows; r++) store8(tile->out[r] + i, sum[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < m->dim; i += 8) store8(tile->out[r] + i, load8(tile->out[r] + i) / total[r]);
}

static void attend_task(void *pointer, int index) {
    const Step *s = pointer;
    const Model *m = s->model;
    const int shared = m->heads / m->kv_heads, rows = shared * s->m, tiles = (rows + TILE - 1) / TILE;
    const int kv = index / tiles, first = index % tiles * TILE, count = least(TILE, rows - first);
    Tile tile;
    for (int r = 0; r < count; r++) {
        const int row = (first + r) / shared, head = kv * shared + (first + r) % shared;
        const int64_t at = ((int64_t)row * m->heads + head) * m->dim;
        tile.q[r] = s->q + at, tile.out[r] = s->att + at, tile.limit[r] = s->position + row + 1;
    }
    const float *keys = s->layer->keys + (int64_t)kv * m->dim * m->capacity;
    const float *values = s->layer->values + (int64_t)kv * m->capacity * m->dim;
    if (count == TILE) attend(m, keys, values, &tile, TILE);
    else
        for (int r = 0; r < count; r++) {
            Tile one = {{tile.q[r]}, {tile.out[r]}, {tile.limit[r]}};
            attend(m, keys, values, &one, 1);
        }
}

static int one_layer(Step *s, const Layer *layer) {
    const Model *m = s->model;
    s->layer = layer;
    s->weight = layer->norm1;
    each(norm_row, s, s->m);
    if (linears((const Weights *[]){layer->q, layer->k, layer->v}, 3, s->normed, s->m, (float *[]){s->q, s->k, s->v}, m->exact))
        return -1;
    each(place_row, s, s->m);
    const int tiles = (m->heads / m->kv_heads * s->m + TILE - 1) / TILE * m->kv_heads;
    if ((int64_t)s->m * (s->position + s->m) * m->heads * m->dim * 2 >= SMALL_WORK) parallel(attend_task, s, tiles);
    else
        for (int i = 0; i < tiles; i++) attend_task(s, i);
    if (linears(&layer->o, 1, s->att, s->m, (float *[]){s->normed}, m->exact)) return -1;
    /* the sum of the attention's output is read from where the next norm writes, one row at a time */
    s->delta = s->normed;
    s->weight = layer->norm2;
    each(norm_row, s, s->m);
    if (linears((const Weights *[]){layer->gate, layer->up}, 2, s->normed, s->m, (float *[]){s->gate, s->up}, m->exact))
        return -1;
    each(silu_row, s, s->m);
    return linears(&layer->down, 1, s->gate, s->m, (float *[]){s->normed}, m->exact);
}

/* embedded [m][hidden], overwritten, at `position` ... -> the last `keep` rows: logits [keep][vocabulary], or normed states.
Returns 0, or -1 when memory ran out. */
int gptq_step(const Model *model, float *embedded, int m, int position, int keep, float *out) {
    const size_t rows = (size_t)m, hidden = (size_t)model->hidden, q = (size_t)model->heads * (size_t)model->dim;
    const size_t kv = (size_t)model->kv_heads * (size_t)model->dim, ffn = (size_t)model->ffn;
    const size_t mixed = 2 * q + 2 * kv > 2 * ffn ? 2 * q + 2 * kv : 2 * ffn; /* attention's and the MLP's halves share memory */
    float *memory = malloc(sizeof(float) * rows * (hidden + mixed));
    if (!memory) return -1;
    float *rest = memory + rows * hidden;
    Step s = {.model = model, .h = embedded, .normed = memory, .m = m, .position = position};
    s.q = rest, s.att = s.q + rows * q, s.k = s.att + rows * q, s.v = s.k + rows * kv;
    s.gate = rest, s.up = rest + rows * ffn;
    int status = 0;
    for (int i = 0; i < model->layers && !status; i++) {
        status = one_layer(&s, model->layer + i);
        s.delta = s.normed;
    }
    if (!status) {
        s.weight = model->norm;
        each(norm_row, &s, m);
        const float *last = s.normed + (rows - (size_t)keep) * hidden;
        if (model->head) status = linears(&model->head, 1, last, keep, (float *[]){out}, model->exact);
        else memcpy(out, last, sizeof(float) * (size_t)keep * hidden);
    }
    free(memory);
    return status;
}
