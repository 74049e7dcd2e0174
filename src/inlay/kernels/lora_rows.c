/* Rows of one token, each with its own LoRA factors: y + s B A x. lora_rows.py has the plain form. */

#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#ifndef AHEAD
#define AHEAD 1024
#endif
/* Two rows of sums for four ranks fit the registers of either kind. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { RANKS = 4, ROWS = 4, MOST = 256 };
typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline float sum(vec v) { float t = 0; for (int i = 0; i < LANES; i++) t += v[i]; return t; }

/* s[n][r] = A[r] . x[n] for `rows` rows of x and RANKS rows of A, which is read once. */
#define DOTS(rows)                                                                                         \
    static void dots_##rows(const float *A, const float *const *x, float *const *s, int64_t in) {          \
        vec t[rows][RANKS] = {{{0}}};                                                                      \
        int64_t i = 0;                                                                                     \
        for (; i + LANES <= in; i += LANES)                                                                \
            for (int r = 0; r < RANKS; r++) {                                                              \
                __builtin_prefetch(A + r * in + i + AHEAD);                                                \
                vec a = load(A + r * in + i);                                                              \
                for (int n = 0; n < rows; n++) t[n][r] += a * load(x[n] + i);                              \
            }                                                                                              \
        for (int n = 0; n < rows; n++)                                                                     \
            for (int r = 0; r < RANKS; r++) {                                                              \
                float total = sum(t[n][r]);                                                                \
                for (int64_t j = i; j < in; j++) total += A[r * in + j] * x[n][j];                         \
                s[n][r] = total;                                                                           \
            }                                                                                              \
    }                                                                                                      \
    static void adds_##rows(const float *B, float *const *s, float *const *y, int64_t out) {               \
        int64_t i = 0;                                                                                     \
        for (; i + LANES <= out; i += LANES) {                                                             \
            vec b[RANKS];                                                                                  \
            for (int r = 0; r < RANKS; r++) {                                                              \
                __builtin_prefetch(B + r * out + i + AHEAD);                                               \
                b[r] = load(B + r * out + i);                                                              \
            }                                                                                              \
            for (int n = 0; n < rows; n++) {                                                               \
                vec v = load(y[n] + i);                                                                    \
                for (int r = 0; r < RANKS; r++) v += s[n][r] * b[r];                                       \
                store(y[n] + i, v);                                                                        \
            }                                                                                              \
        }                                                                                                  \
        for (; i < out; i++)                                                                               \
            for (int n = 0; n < rows; n++)                                                                 \
                for (int r = 0; r < RANKS; r++) y[n][i] += s[n][r] * B[r * out + i];                       \
    }

DOTS(1)
DOTS(2)
DOTS(3)
DOTS(4)

typedef void dots_of(const float *, const float *const *, float *const *, int64_t);
typedef void adds_of(const float *, float *const *, float *const *, int64_t);

/* Segment j holds the rows order[first[j]] ... order[first[j + 1] - 1], all with factors j: A (rank, in), B (rank, out)
 * with s in it, rank a multiple of RANKS. A row of x has `in` numbers, one of y `out`; y is changed in place. */
int inlay_lora_rows(const float *x, float *y, const float *A, const float *B, const int64_t *order, const int64_t *first,
                    int64_t segments, int64_t rank, int64_t in, int64_t out, int threads) {
    static dots_of *const dots[] = {0, dots_1, dots_2, dots_3, dots_4};
    static adds_of *const adds[] = {0, adds_1, adds_2, adds_3, adds_4};
    if (rank > MOST || rank % RANKS) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t j = 0; j < segments; j++)
        for (int64_t at = first[j]; at < first[j + 1]; at += ROWS) {
            const int count = first[j + 1] - at < ROWS ? (int)(first[j + 1] - at) : ROWS;
            float s[ROWS][MOST], *sums[ROWS], *ys[ROWS];
            const float *xs[ROWS];
            for (int n = 0; n < count; n++) xs[n] = x + order[at + n] * in, ys[n] = y + order[at + n] * out;
            for (int64_t r = 0; r < rank; r += RANKS) {
                for (int n = 0; n < count; n++) sums[n] = s[n] + r;
                dots[count](A + (j * rank + r) * in, xs, sums, in);
            }
            for (int64_t r = 0; r < rank; r += RANKS) {
                for (int n = 0; n < count; n++) sums[n] = s[n] + r;
                adds[count](B + (j * rank + r) * out, sums, ys, out);
            }
        }
    return 0;
}
