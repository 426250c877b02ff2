/* The recurrence of RWKV-7 for training on a CPU: forward and backward of one head.

   State S[i][j] (i: value channel, j: key channel), zero at the begin of a document; per token
     sa = S a;  S = S diag(w) + sa b^T + v k^T;  y = S r
   The forward pass keeps the state before every CHUNK tokens; the backward pass runs each chunk again from there.
   r, w, k, v, a, b, y: float [batch, tokens, heads, N]; begins: uint8 [batch, tokens]. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define N 64
#define CHUNK 16
typedef float State[N][N];

static inline void step(State s, const float *restrict w, const float *restrict k, const float *restrict v,
                        const float *restrict a, const float *restrict b, float *restrict sa) {
    for (int i = 0; i < N; i++) {
        float sum = 0, value = v[i];
        for (int j = 0; j < N; j++) sum += s[i][j] * a[j];
        for (int j = 0; j < N; j++) s[i][j] = s[i][j] * w[j] + sum * b[j] + value * k[j];
        sa[i] = sum;
    }
}

/* kept: float [batch, heads, ceil(tokens / CHUNK), N, N] */
void wkv7_forward(int batch, int tokens, int heads, const float *r, const float *w, const float *k, const float *v,
                  const float *a, const float *b, const uint8_t *begins, float *y, float *kept) {
    int chunks = (tokens + CHUNK - 1) / CHUNK;
    for (int n = 0; n < batch * heads; n++) {
        State s;
        float sa[N];
        memset(s, 0, sizeof s);
        for (int t = 0; t < tokens; t++) {
            size_t at = (((size_t)(n / heads) * tokens + t) * heads + n % heads) * N;
            if (begins[(size_t)(n / heads) * tokens + t]) memset(s, 0, sizeof s);
            if (t % CHUNK == 0) memcpy(kept + ((size_t)n * chunks + t / CHUNK) * N * N, s, sizeof s);
            step(s, w + at, k + at, v + at, a + at, b + at, sa);
            for (int i = 0; i < N; i++) {
                float sum = 0;
                for (int j = 0; j < N; j++) sum += s[i][j] * r[at + j];
                y[at + i] = sum;
            }
        }
    }
}

/* Returns 0, or 1 where memory is short. dy: gradient of y; dr to db are written. */
int wkv7_backward(int batch, int tokens, int heads, const float *r, const float *w, const float *k, const float *v,
                  const float *a, const float *b, const uint8_t *begins, const float *kept, const float *dy, float *dr,
                  float *dw, float *dk, float *dv, float *da, float *db) {
    int chunks = (tokens + CHUNK - 1) / CHUNK;
    static State zero; /* never written */
    State *states = malloc((CHUNK + 1) * sizeof(State)); /* before each token of the chunk, and after the last */
    if (!states) return 1;
    for (int n = 0; n < batch * heads; n++) {
        State ds;
        float sa[CHUNK][N], dsa;
        memset(ds, 0, sizeof ds);
        for (int c = chunks - 1; c >= 0; c--) {
            int first = c * CHUNK, last = first + CHUNK < tokens ? first + CHUNK : tokens;
            const uint8_t *begin = begins + (size_t)(n / heads) * tokens;
            memcpy(states[0], kept + ((size_t)n * chunks + c) * N * N, sizeof(State));
            for (int t = first; t < last; t++) {
                size_t at = (((size_t)(n / heads) * tokens + t) * heads + n % heads) * N;
                float(*s)[N] = states[t - first + 1];
                if (begin[t]) memset(s, 0, sizeof(State));
                else memcpy(s, states[t - first], sizeof(State));
                step(s, w + at, k + at, v + at, a + at, b + at, sa[t - first]);
            }
            for (int t = last - 1; t >= first; t--) {
                size_t at = (((size_t)(n / heads) * tokens + t) * heads + n % heads) * N;
                const float *restrict R = r + at, *restrict W = w + at, *restrict K = k + at, *restrict V = v + at;
                const float *restrict A = a + at, *restrict B = b + at, *restrict DY = dy + at, *restrict SA = sa[t - first];
                float(*restrict now)[N] = states[t - first + 1], (*old)[N] = begin[t] ? zero : states[t - first];
                float gr[N] = {0}, gw[N] = {0}, gk[N] = {0}, ga[N] = {0}, gb[N] = {0};
                for (int i = 0; i < N; i++) {
                    float g = DY[i], value = V[i], first_sa = SA[i], gv = 0;
                    float *restrict d = ds[i];
                    dsa = 0;
                    for (int j = 0; j < N; j++) {
                        float x = d[j] + g * R[j];
                        d[j] = x;
                        gr[j] += now[i][j] * g;
                        gv += x * K[j];
                        dsa += x * B[j];
                        gk[j] += x * value;
                        gb[j] += x * first_sa;
                        gw[j] += x * old[i][j];
                    }
                    dv[at + i] = gv;
                    for (int j = 0; j < N; j++) {
                        ga[j] += old[i][j] * dsa;
                        d[j] = d[j] * W[j] + dsa * A[j];
                    }
                }
                if (begin[t]) memset(ds, 0, sizeof ds);
                memcpy(dr + at, gr, sizeof gr), memcpy(dw + at, gw, sizeof gw), memcpy(dk + at, gk, sizeof gk);
                memcpy(da + at, ga, sizeof ga), memcpy(db + at, gb, sizeof gb);
            }
        }
    }
    free(states);
    return 0;
}
