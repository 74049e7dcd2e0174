/* The skinny products of a low-rank piece in bf16, next to memory: lowrank.py has the plain form.

   A block of 64 rows of x or dy is multiplied, added to and summed over while it is in the second-level cache. Factors
   come as the fp32 masters that they are and are rounded while they are laid out. Sums are in fp32.

   Everything is made of one step: a tile of 16 x 16 sums takes 16 rows of 32 values times a laid-out tile, whose dword
   [k][n] holds the values 2k and 2k + 1 of column n. AMX has that step as one instruction; AVX512-BF16 has it as 256. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NONE = 0, VECTOR = 1, TILES = 2 };
enum { OK = 0, UNSUPPORTED = 1 };
enum { ROWS = 64, TILE = 512 }; /* rows of a block; values of a laid-out tile */

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f")))

typedef uint16_t bf16;

typedef struct {
    const bf16 *x, *dy;
    const float *A, *B;
    bf16 *s, *y, *dx;
    float *dA, *dB;
    int64_t ldx, lddy, ldy, lddx, M, I, O, R;
    float scale;
    int add, level;
    bf16 *A_tiles, *B_tiles;
    float *A_sums, *B_sums; /* of this worker */
} job_t;

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static void *room(int64_t bytes) { return aligned_alloc(64, (size_t)up(bytes + 64, 64)); }

/* ---- the step ---- */

AVX512 static void tile_vector(const bf16 *a, int64_t lda, const bf16 *b, int64_t kt, float *c, int64_t ldc, int add) {
    __m512 sum[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) sum[r] = add ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
    for (int64_t k = 0; k < kt; k++)
        for (int p = 0; p < 16; p++) {
            const __m512bh column = (__m512bh)_mm512_loadu_si512(b + k * TILE + p * 32);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) {
                int32_t pair;
                memcpy(&pair, a + r * lda + k * 32 + p * 2, 4);
                sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), column);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) _mm512_storeu_ps(c + r * ldc, sum[r]);
}

AMX static void tiles_begin(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int t = 0; t < 8; t++) { config.bytes[t] = 64; config.rows[t] = 16; }
    _tile_loadconfig(&config);
}

AMX static void tiles_end(void) { _tile_release(); }

/* c[16 rt][16] = a[16 rt][32 kt] b: four tiles of rows share a tile of b. */
AMX static void rows_tiles(const bf16 *a, int64_t lda, const bf16 *b, int64_t kt, float *c, int64_t ldc, int rt) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t k = 0; k < kt; k++) {
        const bf16 *at = a + k * 32;
        _tile_loadd(4, b + k * TILE, 64);
        _tile_loadd(5, at, lda * 2); _tile_dpbf16ps(0, 5, 4);
        if (rt > 1) { _tile_loadd(6, at + 16 * lda, lda * 2); _tile_dpbf16ps(1, 6, 4); }
        if (rt > 2) { _tile_loadd(7, at + 32 * lda, lda * 2); _tile_dpbf16ps(2, 7, 4); }
        if (rt > 3) { _tile_loadd(5, at + 48 * lda, lda * 2); _tile_dpbf16ps(3, 5, 4); }
    }
    _tile_stored(0, c, ldc * 4);
    if (rt > 1) _tile_stored(1, c + 16 * ldc, ldc * 4);
    if (rt > 2) _tile_stored(2, c + 32 * ldc, ldc * 4);
    if (rt > 3) _tile_stored(3, c + 48 * ldc, ldc * 4);
}

/* c[16][16 ct] += a[16][32 kt] b, b panel after panel: four tiles of columns share a tile of a. */
AMX static void columns_tiles(const bf16 *a, int64_t lda, const bf16 *b, int64_t kt, float *c, int64_t ldc, int ct) {
    _tile_loadd(0, c, ldc * 4);
    if (ct > 1) _tile_loadd(1, c + 16, ldc * 4);
    if (ct > 2) _tile_loadd(2, c + 32, ldc * 4);
    if (ct > 3) _tile_loadd(3, c + 48, ldc * 4);
    for (int64_t k = 0; k < kt; k++) {
        const bf16 *at = b + k * TILE;
        _tile_loadd(4, a + k * 32, lda * 2);
        _tile_loadd(5, at, 64); _tile_dpbf16ps(0, 4, 5);
        if (ct > 1) { _tile_loadd(6, at + kt * TILE, 64); _tile_dpbf16ps(1, 4, 6); }
        if (ct > 2) { _tile_loadd(7, at + 2 * kt * TILE, 64); _tile_dpbf16ps(2, 4, 7); }
        if (ct > 3) { _tile_loadd(5, at + 3 * kt * TILE, 64); _tile_dpbf16ps(3, 4, 5); }
    }
    _tile_stored(0, c, ldc * 4);
    if (ct > 1) _tile_stored(1, c + 16, ldc * 4);
    if (ct > 2) _tile_stored(2, c + 32, ldc * 4);
    if (ct > 3) _tile_stored(3, c + 48, ldc * 4);
}

static void by_rows(int level, const bf16 *a, int64_t lda, const bf16 *b, int64_t kt, float *c, int64_t ldc, int rt) {
    if (level == TILES) rows_tiles(a, lda, b, kt, c, ldc, rt);
    else for (int t = 0; t < rt; t++) tile_vector(a + t * 16 * lda, lda, b, kt, c + t * 16 * ldc, ldc, 0);
}

static void by_columns(int level, const bf16 *a, int64_t lda, const bf16 *b, int64_t kt, float *c, int64_t ldc, int ct) {
    if (level == TILES) columns_tiles(a, lda, b, kt, c, ldc, ct);
    else for (int t = 0; t < ct; t++) tile_vector(a, lda, b + t * kt * TILE, kt, c + t * 16, ldc, 1);
}

/* ---- layouts ---- */

AVX512 static inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
AVX512 static inline __mmask16 first(int64_t n) { return (__mmask16)(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1); }
AVX512 static inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

/* Tiles [N/16][K/32] of w with N rows of K values: its product is a wᵀ. */
AVX512 static void lay_rows(const float *w, int64_t N, int64_t K, bf16 *to) {
    const __m512i every = _mm512_mullo_epi32(_mm512_set1_epi32(16),
                                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t n = 0; n < N; n += 16)
        for (int64_t k = 0; k < K; k += 32, to += TILE) {
            int32_t pairs[16][16];
            for (int r = 0; r < 16; r++) {
                const float *row = w + (n + r < N ? n + r : 0) * K + k;
                const __mmask16 low = n + r < N ? first(K - k) : 0, high = n + r < N ? first(K - k - 16) : 0;
                _mm512_storeu_si512(pairs[r], rounded(_mm512_maskz_loadu_ps(low, row), _mm512_maskz_loadu_ps(high, row + 16)));
            }
            for (int p = 0; p < 16; p++)
                _mm512_storeu_si512(to + p * 32, 2 * p < K - k ? _mm512_i32gather_epi32(every, &pairs[0][p], 4)
                                                               : _mm512_setzero_si512());
        }
}

/* Tiles [N/16][K/32] of w with K rows of N values: its product is a w. */
AVX512 static void lay_columns(const float *w, int64_t K, int64_t N, bf16 *to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t n = 0; n < N; n += 16)
        for (int64_t k = 0; k < up(K, 32); k += 2, to += 32) {
            const __mmask16 even = k < K ? first(N - n) : 0, odd = k + 1 < K ? first(N - n) : 0;
            const float *row = w + (k < K ? k : 0) * N + n;
            const __m512i both = rounded(_mm512_maskz_loadu_ps(even, row), _mm512_maskz_loadu_ps(odd, row + N));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
        }
}

/* Tiles [columns/16][kt] of 16 ct columns of a block: its product sums over the rows. */
AVX512 static void lay_block(const bf16 *x, int64_t ld, int64_t kt, int ct, bf16 *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int c = 0; c < ct; c += 2)
        for (int64_t r = 0; r < kt * 16; r++) {
            const __m512i even = _mm512_loadu_si512(x + 2 * r * ld + c * 16), odd = _mm512_loadu_si512(x + (2 * r + 1) * ld + c * 16);
            _mm512_storeu_si512(to + c * kt * TILE + r * 32, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + (c + 1) * kt * TILE + r * 32, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* A block with whole tiles: the rows themselves, or a copy with zeros around it. */
static const bf16 *whole(const bf16 *x, int64_t *ld, int64_t rows, int64_t cols, bf16 *copy) {
    if (rows % 32 == 0 && cols % 32 == 0) return x;
    const int64_t wide = up(cols, 32);
    for (int64_t r = 0; r < rows; r++) {
        memcpy(copy + r * wide, x + r * *ld, (size_t)cols * 2);
        memset(copy + r * wide + cols, 0, (size_t)(wide - cols) * 2);
    }
    memset(copy + rows * wide, 0, (size_t)((up(rows, 32) - rows) * wide) * 2);
    *ld = wide;
    return copy;
}

AVX512 static void round_tile(const float *c, int64_t rows, float scale, bf16 *to, int64_t ld) {
    for (int64_t r = 0; r < rows; r++)
        _mm256_storeu_si256((__m256i *)(to + r * ld),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(c + r * 16), _mm512_set1_ps(scale))));
}

static void turn(const bf16 *s, int64_t ld, int64_t rows, int64_t cols, bf16 *to) {
    for (int64_t c = 0; c < cols; c++)
        for (int64_t r = 0; r < rows; r++) to[c * ROWS + r] = s[r * ld + c];
}

/* y += scale c, or y = scale c, for up to 32 columns. */
AVX512 static void put(const float *c, int64_t rows, int64_t cols, float scale, int add, bf16 *y, int64_t ld) {
    const __m512 factor = _mm512_set1_ps(scale);
    if (cols == 32 && add) {
        for (int64_t r = 0; r < rows; r++, y += ld, c += 32) {
            const __m512 low = widened(_mm256_loadu_si256((const __m256i *)y));
            const __m512 high = widened(_mm256_loadu_si256((const __m256i *)(y + 16)));
            _mm512_storeu_si512(y, rounded(_mm512_fmadd_ps(factor, _mm512_loadu_ps(c), low),
                                           _mm512_fmadd_ps(factor, _mm512_loadu_ps(c + 16), high)));
        }
        return;
    }
    const __mmask16 low = first(cols), high = first(cols - 16);
    const __mmask32 both = (__mmask32)low | (__mmask32)high << 16;
    for (int64_t r = 0; r < rows; r++, y += ld, c += 32) {
        const __m512i old = add ? _mm512_maskz_loadu_epi16(both, y) : _mm512_setzero_si512();
        const __m512 a = _mm512_fmadd_ps(factor, _mm512_loadu_ps(c), widened(_mm512_castsi512_si256(old)));
        const __m512 b = _mm512_fmadd_ps(factor, _mm512_loadu_ps(c + 16), widened(_mm512_extracti64x4_epi64(old, 1)));
        _mm512_mask_storeu_epi16(y, both, rounded(a, b));
    }
}

/* ---- a block of rows ---- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* low[rows][R up to 32] = scale a w, w in tiles. */
static void down(const job_t *j, const bf16 *a, int64_t ld, int64_t rows, int64_t K, const bf16 *tiles, float scale, bf16 *low) {
    const int64_t kt = up(K, 32) / 32, wide = up(j->R, 32);
    float c[ROWS * 16] __attribute__((aligned(64)));
    for (int64_t r = 0; r < j->R; r += 16) {
        by_rows(j->level, a, ld, tiles + r / 16 * kt * TILE, kt, c, 16, (int)(up(rows, 16) / 16));
        round_tile(c, up(rows, 16), scale, low + r, wide);
    }
}

/* y[rows][N] (+)= scale low w, w in tiles. */
static void out(const job_t *j, const bf16 *low, int64_t rows, int64_t N, const bf16 *tiles, float scale, int add, bf16 *y, int64_t ld) {
    const int64_t wide = up(j->R, 32), kt = wide / 32;
    const int rt = (int)(up(rows, 16) / 16);
    /* Two buffers: what a tile has stored can be read only some time later. */
    float c[2][ROWS * 32] __attribute__((aligned(64)));
    for (int64_t n = 0; n < N + 32; n += 32) {
        float *now = c[n / 32 % 2];
        if (n < N) by_rows(j->level, low, wide, tiles + n / 16 * kt * TILE, kt, now, 32, rt);
        if (n + 16 < N) by_rows(j->level, low, wide, tiles + (n / 16 + 1) * kt * TILE, kt, now + 16, 32, rt);
        if (n) put(c[1 - n / 32 % 2], rows, least(32, N - n + 32), scale, add, y + n - 32, ld);
    }
}

/* sums[R][N up to 32] += turnedᵀ x. */
static void sum(const job_t *j, const bf16 *turned, const bf16 *x, int64_t ld, int64_t rows, int64_t N, float *sums) {
    const int64_t kt = up(rows, 32) / 32, wide = up(N, 32);
    bf16 tiles[4 * 2 * TILE] __attribute__((aligned(64)));
    for (int64_t n = 0; n < wide; n += 64) {
        const int ct = wide - n < 64 ? 2 : 4;
        lay_block(x + n, ld, kt, ct, tiles);
        for (int64_t r = 0; r < j->R; r += 16)
            by_columns(j->level, turned + r * ROWS, ROWS, tiles, kt, sums + r * wide + n, wide, ct);
    }
}

static void forward_rows(const job_t *j, int64_t from, int64_t to) {
    const int64_t wide = up(j->R, 32);
    bf16 *low = room(ROWS * wide * 2), *copy = room(ROWS * up(j->I, 32) * 2);
    memset(low, 0, (size_t)(ROWS * wide) * 2);
    if (j->level == TILES) tiles_begin();
    for (int64_t m = from; m < to; m += ROWS) {
        const int64_t rows = least(ROWS, to - m);
        int64_t ld = j->ldx;
        const bf16 *x = whole(j->x + m * ld, &ld, rows, j->I, copy);
        down(j, x, ld, rows, j->I, j->A_tiles, 1.0f, low);
        for (int64_t r = 0; r < rows; r++) memcpy(j->s + (m + r) * j->R, low + r * wide, (size_t)j->R * 2);
        out(j, low, rows, j->O, j->B_tiles, j->scale, 1, j->y + m * j->ldy, j->ldy);
    }
    if (j->level == TILES) tiles_end();
    free(low);
    free(copy);
}

static void backward_rows(const job_t *j, int64_t from, int64_t to) {
    const int64_t wide = up(j->R, 32), widest = j->I > j->O ? j->I : j->O;
    bf16 *low = room(ROWS * wide * 2), *turned = room(ROWS * wide * 2), *copy = room(ROWS * up(widest, 32) * 2);
    memset(low, 0, (size_t)(ROWS * wide) * 2);
    if (j->level == TILES) tiles_begin();
    for (int64_t m = from; m < to; m += ROWS) {
        const int64_t rows = least(ROWS, to - m);
        int64_t ld = j->lddy;
        const bf16 *dy = whole(j->dy + m * ld, &ld, rows, j->O, copy);
        down(j, dy, ld, rows, j->O, j->B_tiles, j->scale, low);
        memset(turned, 0, (size_t)(ROWS * wide) * 2);
        turn(j->s + m * j->R, j->R, rows, j->R, turned);
        sum(j, turned, dy, ld, rows, j->O, j->B_sums);
        ld = j->ldx;
        const bf16 *x = whole(j->x + m * ld, &ld, rows, j->I, copy);
        turn(low, wide, rows, j->R, turned);
        sum(j, turned, x, ld, rows, j->I, j->A_sums);
        if (j->dx) out(j, low, rows, j->I, j->A_tiles, 1.0f, j->add, j->dx + m * j->lddx, j->lddx);
    }
    if (j->level == TILES) tiles_end();
    free(low);
    free(turned);
    free(copy);
}

/* sums[m] = x[m] Aᵀ B[m]: nothing is rounded on the way. */
AVX512 static void cross_rows(const job_t *j, int64_t from, int64_t to, float *sums) {
    const int64_t kt = up(j->I, 32) / 32;
    bf16 *copy = room(ROWS * up(j->I, 32) * 2);
    float c[ROWS * 16] __attribute__((aligned(64)));
    if (j->level == TILES) tiles_begin();
    for (int64_t m = from; m < to; m += ROWS) {
        const int64_t rows = least(ROWS, to - m);
        int64_t ld = j->ldx;
        const bf16 *x = whole(j->x + m * ld, &ld, rows, j->I, copy);
        for (int64_t r = 0; r < rows; r++) sums[m + r] = 0.0f;
        for (int64_t n = 0; n < j->R; n += 16) {
            by_rows(j->level, x, ld, j->A_tiles + n / 16 * kt * TILE, kt, c, 16, (int)(up(rows, 16) / 16));
            const __mmask16 some = first(j->R - n);
            for (int64_t r = 0; r < rows; r++) {
                const __m512 b = _mm512_maskz_loadu_ps(some, j->B + (m + r) * j->R + n);
                sums[m + r] += _mm512_reduce_add_ps(_mm512_mul_ps(b, _mm512_loadu_ps(c + r * 16)));
            }
        }
    }
    if (j->level == TILES) tiles_end();
    free(copy);
}

/* ---- entries ---- */

int inlay_lowrank_level(void) {
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")
        || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bf16")) return NONE;
    /* Linux lends a process the tiles when it asks: 0x1023 is ARCH_REQ_XCOMP_PERM, 18 their data. */
    const int tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    return tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? TILES : VECTOR;
}

static int64_t share(int64_t M, int workers) { return up((M + workers - 1) / workers, ROWS); }

/* s = x Aᵀ; y += scale s Bᵀ. */
int inlay_lowrank_forward(const bf16 *x, int64_t ldx, const float *A, const float *B, bf16 *s, bf16 *y, int64_t ldy,
                          int64_t M, int64_t I, int64_t O, int64_t R, float scale, int level, int workers) {
    job_t job = {.x = x, .A = A, .B = B, .s = s, .y = y, .ldx = ldx, .ldy = ldy,
                 .M = M, .I = I, .O = O, .R = R, .scale = scale, .level = level};
    job.A_tiles = room(up(R, 16) * up(I, 32) * 2);
    job.B_tiles = room(up(O, 16) * up(R, 32) * 2);
    lay_rows(A, R, I, job.A_tiles);
    lay_rows(B, O, R, job.B_tiles);
    const int64_t each = share(M, workers);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
    for (int w = 0; w < workers; w++)
        if (w * each < M) forward_rows(&job, w * each, least(M, (w + 1) * each));
    free(job.A_tiles);
    free(job.B_tiles);
    return OK;
}

/* sums[m] = x[m] Aᵀ B[m], with M rows in both x and B. */
int inlay_lowrank_cross(const bf16 *x, int64_t ldx, const float *A, const float *B, float *sums, int64_t M, int64_t I,
                        int64_t R, int level, int workers) {
    job_t job = {.x = x, .A = A, .B = B, .ldx = ldx, .M = M, .I = I, .O = M, .R = R, .level = level};
    job.A_tiles = room(up(R, 16) * up(I, 32) * 2);
    lay_rows(A, R, I, job.A_tiles);
    const int64_t each = share(M, workers);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
    for (int w = 0; w < workers; w++)
        if (w * each < M) cross_rows(&job, w * each, least(M, (w + 1) * each), sums);
    free(job.A_tiles);
    return OK;
}

/* ds = scale dy B; dB = scale dyᵀ s; dA = dsᵀ x; dx += ds A, or dx = ds A, or nothing where dx is null. */
int inlay_lowrank_backward(const bf16 *dy, int64_t lddy, const bf16 *x, int64_t ldx, bf16 *s, const float *A,
                           const float *B, float *dA, float *dB, bf16 *dx, int64_t lddx, int add, int64_t M, int64_t I,
                           int64_t O, int64_t R, float scale, int level, int workers) {
    job_t job = {.x = x, .dy = dy, .A = A, .B = B, .s = s, .dx = dx, .dA = dA, .dB = dB, .ldx = ldx, .lddy = lddy,
                 .lddx = lddx, .M = M, .I = I, .O = O, .R = R, .scale = scale, .add = add, .level = level};
    const int64_t wide_I = up(I, 32), wide_O = up(O, 32), high = up(R, 16), sums = high * (wide_I + wide_O);
    job.A_tiles = room(up(I, 16) * up(R, 32) * 2);
    job.B_tiles = room(up(R, 16) * wide_O * 2);
    job.A_sums = room(workers * sums * 4);
    memset(job.A_sums, 0, (size_t)(workers * sums) * 4);
    if (dx) lay_columns(A, R, I, job.A_tiles);
    lay_columns(B, O, R, job.B_tiles);
    const int64_t each = share(M, workers);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
    for (int w = 0; w < workers; w++) {
        job_t mine = job;
        mine.A_sums = job.A_sums + w * sums;
        mine.B_sums = mine.A_sums + high * wide_I;
        if (w * each < M) backward_rows(&mine, w * each, least(M, (w + 1) * each));
    }
    for (int w = 1; w < workers; w++)
        for (int64_t i = 0; i < sums; i++) job.A_sums[i] += job.A_sums[w * sums + i];
    for (int64_t r = 0; r < R; r++) memcpy(dA + r * I, job.A_sums + r * wide_I, (size_t)I * 4);
    const float *B_sums = job.A_sums + high * wide_I;
    for (int64_t o = 0; o < O; o++)
        for (int64_t r = 0; r < R; r++) dB[o * R + r] = scale * B_sums[r * wide_O + o];
    free(job.A_tiles);
    free(job.B_tiles);
    free(job.A_sums);
    return OK;
}

#else
int inlay_lowrank_level(void) { return NONE; }
int inlay_lowrank_forward(void) { return UNSUPPORTED; }
int inlay_lowrank_cross(void) { return UNSUPPORTED; }
int inlay_lowrank_backward(void) { return UNSUPPORTED; }
#endif
