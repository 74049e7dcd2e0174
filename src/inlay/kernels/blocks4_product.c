/* Products with a packed 4-bit weight that is decoded piece by piece while it is multiplied.

       FORWARD   y[M, O]  = x[M, I] Wᵀ + bias         W[o, i] = book[index] * scale of its block, rounded to the dtype
       BACKWARD  dx[M, I] = dy[M, O] W

   Sums are fp32; each entry of the result is summed in an order that depends on the weight's shape alone, not on M or on
   the number of threads.

   Everything is cut into tiles of 16 rows of 16 words of 32 bits: a word is one fp32 or two neighbouring bf16 of the
   dimension that is summed. A left tile holds [row][word of the sum], a right tile [word of the sum][column], which is
   what AMX reads, and serves the vector forms as well. Forward W is left, as it lies, and x right, so that the
   result comes out transposed; backward dy is left and W right, where two rows of W interleave into words.

   Two left (or one) and two right (or one) tiles of a step of the sum lie together, steps follow each other. A piece of
   W is PIECE words of the sum times 32 (forward) or 64 (backward) features; GROUP rows of the activations wait in the
   cache for it. */

#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { VECTOR = 0, AMX = 1 };
enum { OK = 0, UNSUPPORTED = 1 };

#if !defined(__x86_64__)

int inlay_product4_form(int dtype) { (void)dtype; return -1; }
int64_t inlay_product4_workspace(int64_t M, int64_t K, int64_t N, int dtype, int threads) {
    (void)M; (void)K; (void)N; (void)dtype; (void)threads; return 0;
}
int inlay_product4(const void *x, int64_t M, const uint8_t *packed, int64_t O, int64_t I, int64_t block, const float *book,
                   const float *absmax, const uint8_t *codes, const float *map, int nested_shift, float offset,
                   const void *bias, void *out, int dtype, int backward, int form, char *workspace, int threads) {
    (void)x; (void)M; (void)packed; (void)O; (void)I; (void)block; (void)book; (void)absmax; (void)codes; (void)map;
    (void)nested_shift; (void)offset; (void)bias; (void)out; (void)dtype; (void)backward; (void)form; (void)workspace;
    (void)threads;
    return UNSUPPORTED;
}

#else

#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define V512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define VBF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline))

#ifndef CHUNK
#define CHUNK 1024 /* words of the sum */
#endif
#ifndef PIECE_L
#define PIECE_L 128
#endif
#ifndef PIECE_R
#define PIECE_R 128
#endif
#define PIECE_BYTES 262144
#define WIDTH(I) ((I) % 128 ? 64 : 128) /* columns of W that are decoded at once backward: a line of the cache */
#define OWN (PIECE_BYTES + GROUP * 128 * 4)
#ifndef GROUP
#define GROUP 256 /* rows */
#endif
#define TILE 256 /* words */
#define FURTHER 256 /* bytes of a row that are fetched before their turn */
#define AHEAD 8 /* rows of the weight that are fetched before their turn, in pairs */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int has_bf16(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* Linux lets a process use tile data once it has asked. */
static int has_amx(void) {
#if defined(__linux__)
    unsigned a, b, c, d;
    const unsigned needed = 1u << 22 | 1u << 24; /* bf16, tiles */
    if (!has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 0;
#endif
}

/* The fastest form for a dtype on this machine, -1 for none. */
int inlay_product4_form(int dtype) {
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
          && __builtin_cpu_supports("avx512dq")))
        return -1;
    if (dtype == FLOAT32) return VECTOR;
    return has_amx() ? AMX : has_bf16() ? VECTOR : -1;
}

typedef struct {
    const uint8_t *packed, *codes;
    const float *book, *absmax, *map;
    int64_t I;
    int block_shift, nested_shift;
    float offset;
} weight_t;

INLINE float scale_of(const weight_t w, int64_t b) {
    if (!w.codes) return w.absmax[b];
    float product = w.map[w.codes[b]] * w.absmax[b >> w.nested_shift];
    return product + w.offset;
}

/* The sixteen results of a block, scaled and rounded once. */
V512 INLINE __m512 table(const weight_t w, int64_t at) {
    return _mm512_mul_ps(_mm512_loadu_ps(w.book), _mm512_set1_ps(scale_of(w, at >> w.block_shift)));
}

/* A byte holds two neighbours. Looking up all its upper halves and then all its lower ones spares putting neighbours
   together again: sums over I take even features first, where `pack` has put those of x too, and columns of I are
   sorted by `finish`. vpermd and vpermw look at the low four and five bits of an index. */

/* W[o .. o + 32, words first .. first + 16 steps] as left tiles: a step of even features, then one of odd. */
V512 static void decode_left_float32(const weight_t w, int64_t o, int64_t first, int64_t steps, uint32_t *piece) {
    for (int64_t r0 = 0; r0 < 32; r0 += 16)
        for (int64_t k = 0; k < steps * 16; k += 64)
            for (int64_t r = 0; r < 16; r++) {
                const int64_t at = (o + r0 + r) * w.I + first + k;
                const uint8_t *in = w.packed + at / 2;
                uint32_t *to = piece + k / 16 * 2 * TILE + r0 / 16 * TILE + r * 16;
                const __m512i values = _mm512_castps_si512(table(w, at));
                _mm_prefetch((const char *)in + FURTHER, _MM_HINT_T0);
                for (int i = 0; i < 2; i++, to += 4 * TILE) {
                    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(in + 16 * i)));
                    _mm512_store_si512(to, _mm512_permutexvar_epi32(_mm512_srli_epi32(pairs, 4), values));
                    _mm512_store_si512(to + 2 * TILE, _mm512_permutexvar_epi32(pairs, values));
                }
            }
}

VBF16 static void decode_left_bfloat16(const weight_t w, int64_t o, int64_t first, int64_t steps, uint32_t *piece) {
    for (int64_t r0 = 0; r0 < 32; r0 += 16)
        for (int64_t k = 0; k < steps * 32; k += 64)
            for (int64_t r = 0; r < 16; r++) {
                const int64_t at = (o + r0 + r) * w.I + first * 2 + k;
                const uint8_t *in = w.packed + at / 2;
                uint32_t *to = piece + k / 32 * 2 * TILE + r0 / 16 * TILE + r * 16;
                const __m512 exact = table(w, at);
                const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(exact, exact);
                const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)in));
                _mm_prefetch((const char *)in + FURTHER, _MM_HINT_T0);
                _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), values));
                _mm512_store_si512(to + 2 * TILE, _mm512_permutexvar_epi16(pairs, values));
            }
}

/* W[rows of the sum, i .. i + 64] as right tiles: two pieces of 32 columns, `apart` words from each other, each a tile
   of even columns and one of odd. */
V512 static void decode_right_float32(const weight_t w, int64_t first, int64_t steps, int64_t i, int64_t width,
                                      uint32_t *piece) {
    for (int64_t o = 0; o < steps * 16; o++) {
        const int64_t at = (first + o) * w.I + i;
        uint32_t *to = piece + (o / 16) * 2 * TILE + (o % 16) * 16;
        const uint8_t *in = w.packed + at / 2;
        _mm_prefetch((const char *)(in + AHEAD * w.I), _MM_HINT_T0);
        for (int64_t n = 0; n < width; n += 64) {
            const __m512i values = _mm512_castps_si512(table(w, at + n));
            for (int half = 0; half < 2; half++, in += 16, to += steps * 2 * TILE) {
                const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)in));
                _mm512_store_si512(to, _mm512_permutexvar_epi32(_mm512_srli_epi32(pairs, 4), values));
                _mm512_store_si512(to + TILE, _mm512_permutexvar_epi32(pairs, values));
            }
        }
    }
}

/* A word holds a column of two rows; the fifth bit of the index says whose table it is. */
VBF16 static void decode_right_bfloat16(const weight_t w, int64_t first, int64_t steps, int64_t i, int64_t width,
                                        uint32_t *piece) {
    const __m512i index = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
    for (int64_t word = 0; word < steps * 16; word++) {
        const int64_t at = (first + word) * 2 * w.I + i;
        uint32_t *to = piece + (word / 16) * 2 * TILE + (word % 16) * 16;
        const uint8_t *in = w.packed + at / 2, *next = in + w.I / 2;
        _mm_prefetch((const char *)(in + AHEAD * w.I), _MM_HINT_T0);
        _mm_prefetch((const char *)(next + AHEAD * w.I), _MM_HINT_T0);
        for (int64_t n = 0; n < width; n += 64) {
            const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(table(w, at + w.I + n), table(w, at + n));
            for (int half = 0; half < 2; half++, in += 16, next += 16, to += steps * 2 * TILE) {
                const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)in));
                const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)next));
                const __m512i pairs = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
                const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi32(pairs, 4), index, second, 0xea);
                const __m512i odd = _mm512_ternarylogic_epi32(pairs, index, second, 0xea); /* (a & b) | c */
                _mm512_store_si512(to, _mm512_permutexvar_epi16(even, values));
                _mm512_store_si512(to + TILE, _mm512_permutexvar_epi16(odd, values));
            }
        }
    }
}

V512 INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Two steps (or the last one) of up to 16 rows of the activations (the others 0), `apart` words from each other: as left
   tiles, as they lie; as right tiles, always two, turned, even features before odd ones. */
V512 static void pack(const uint32_t *from, int64_t stride, int64_t rows, int two, int turned, int bf16, uint32_t *to,
                      int64_t apart) {
    const __m512i even32 = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i even16 = _mm512_or_si512(_mm512_slli_epi32(even32, 1), _mm512_slli_epi32(_mm512_add_epi32(even32,
                                           _mm512_set1_epi32(1)), 17)); /* 0, 2, 4, ... 62 */
    const __m512i odd32 = _mm512_add_epi32(even32, _mm512_set1_epi32(1)), odd16 = _mm512_add_epi16(even16, _mm512_set1_epi16(1));
    __m512i r[16], t[16];
    for (int64_t i = 0; i < 16; i++) {
        const __m512i a = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
        const __m512i b = two && i < rows ? _mm512_loadu_si512(from + i * stride + 16) : _mm512_setzero_si512();
        if (!turned) {
            _mm512_store_si512(to + 16 * i, a);
            if (two) _mm512_store_si512(to + apart + 16 * i, b);
        } else if (bf16) {
            r[i] = _mm512_permutex2var_epi16(a, even16, b);
            t[i] = _mm512_permutex2var_epi16(a, odd16, b);
        } else {
            r[i] = _mm512_permutex2var_epi32(a, even32, b);
            t[i] = _mm512_permutex2var_epi32(a, odd32, b);
        }
    }
    if (!turned) return;
    transpose(r);
    for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + 16 * i, r[i]);
    transpose(t);
    for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + apart + 16 * i, t[i]);
}

/* sums[2 * l + r] (+)= Σ over steps of left tile l times right tile r. */
#define VECTOR_KERNEL(NAME, TARGET, ADD)                                                                               \
    TARGET static void NAME(const uint32_t *left, int lefts, const uint32_t *right, int rights, int64_t steps,         \
                            float *sums, int more) {                                                                   \
        for (int g = 0; g < 2 * lefts; g++) {                                                                          \
            const uint32_t *a = left + g * 8 * 16, *b = right;                                                         \
            float *c = sums + (g / 2) * 2 * TILE + (g % 2) * 8 * 16;                                                   \
            __m512 s[8], t[8];                                                                                         \
            for (int i = 0; i < 8; i++) s[i] = t[i] = _mm512_setzero_ps();                                             \
            if (rights == 2)                                                                                           \
                for (int64_t k = 0; k < steps; k++, a += lefts * TILE, b += 2 * TILE)                                  \
                    for (int p = 0; p < 16; p++) {                                                                     \
                        const __m512i u = _mm512_load_si512(b + 16 * p), v = _mm512_load_si512(b + TILE + 16 * p);     \
                        for (int i = 0; i < 8; i++) {                                                                  \
                            const __m512i x = _mm512_set1_epi32((int)a[16 * i + p]);                                   \
                            s[i] = ADD(s[i], x, u);                                                                    \
                            t[i] = ADD(t[i], x, v);                                                                    \
                        }                                                                                              \
                    }                                                                                                  \
            else                                                                                                       \
                for (int64_t k = 0; k < steps; k++, a += lefts * TILE, b += TILE)                                      \
                    for (int p = 0; p < 16; p++) {                                                                     \
                        const __m512i u = _mm512_load_si512(b + 16 * p);                                               \
                        for (int i = 0; i < 8; i++) s[i] = ADD(s[i], _mm512_set1_epi32((int)a[16 * i + p]), u);        \
                    }                                                                                                  \
            for (int i = 0; i < 8; i++) {                                                                              \
                _mm512_store_ps(c + 16 * i, more ? _mm512_add_ps(_mm512_load_ps(c + 16 * i), s[i]) : s[i]);            \
                if (rights == 2)                                                                                       \
                    _mm512_store_ps(c + TILE + 16 * i,                                                                 \
                                    more ? _mm512_add_ps(_mm512_load_ps(c + TILE + 16 * i), t[i]) : t[i]);             \
            }                                                                                                          \
        }                                                                                                              \
    }

#define ADD_FLOAT32(sum, x, y) _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum)
#define ADD_BFLOAT16(sum, x, y) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(y))
VECTOR_KERNEL(kernel_float32, V512, ADD_FLOAT32)
VECTOR_KERNEL(kernel_bfloat16, VBF16, ADD_BFLOAT16)

TILES static void kernel_amx(const uint32_t *left, int lefts, const uint32_t *right, int rights, int64_t steps, float *sums,
                             int more) {
    if (more) {
        _tile_loadd(0, sums, 64);
        if (rights == 2) _tile_loadd(1, sums + TILE, 64);
        if (lefts == 2) _tile_loadd(2, sums + 2 * TILE, 64);
        if (lefts == 2 && rights == 2) _tile_loadd(3, sums + 3 * TILE, 64);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    if (lefts == 2 && rights == 2)
        for (int64_t k = 0; k < steps; k++, left += 2 * TILE, right += 2 * TILE) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, right + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else if (lefts == 2)
        for (int64_t k = 0; k < steps; k++, left += 2 * TILE, right += TILE) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, left + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
    else
        for (int64_t k = 0; k < steps; k++, left += TILE, right += 2 * TILE) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, right + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
    _tile_stored(0, sums, 64);
    if (rights == 2) _tile_stored(1, sums + TILE, 64);
    if (lefts == 2) _tile_stored(2, sums + 2 * TILE, 64);
    if (lefts == 2 && rights == 2) _tile_stored(3, sums + 3 * TILE, 64);
}

typedef struct __attribute__((packed)) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles_t;

/* Other libraries keep a configuration of their own in the same registers: it comes back afterwards. */
TILES static void configure(tiles_t *before) {
    tiles_t ours = {.palette = 1};
    for (int i = 0; i < 8; i++) { ours.bytes[i] = 64; ours.rows[i] = 16; }
    _tile_storeconfig(before);
    _tile_loadconfig(&ours);
}

TILES static void restore(const tiles_t *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* The sums of 16 rows (`rows` of them wanted) and 32 features in their order: turned back (forward: the tiles are of
   neighbouring features), or sorted (backward: of even and odd ones). */
V512 INLINE void in_order(const float *first, const float *second, int turned, const float *bias, __m512 a[16], __m512 b[16]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    if (turned) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(first + 16 * i);
        transpose(r);
        for (int i = 0; i < 16; i++) a[i] = _mm512_castsi512_ps(r[i]);
        for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(second + 16 * i);
        transpose(r);
        for (int i = 0; i < 16; i++) b[i] = _mm512_castsi512_ps(r[i]);
    } else
        for (int i = 0; i < 16; i++) {
            const __m512 even = _mm512_load_ps(first + 16 * i), odd = _mm512_load_ps(second + 16 * i);
            a[i] = _mm512_permutex2var_ps(even, low, odd);
            b[i] = _mm512_permutex2var_ps(even, high, odd);
        }
    if (bias)
        for (int i = 0; i < 16; i++) {
            a[i] = _mm512_add_ps(a[i], _mm512_loadu_ps(bias));
            b[i] = _mm512_add_ps(b[i], _mm512_loadu_ps(bias + 16));
        }
}

V512 static void finish_float32(const float *first, const float *second, int turned, const float *bias, int64_t rows,
                                float *out, int64_t stride) {
    __m512 a[16], b[16];
    in_order(first, second, turned, bias, a, b);
    for (int64_t i = 0; i < rows; i++) {
        _mm512_storeu_ps(out + i * stride, a[i]);
        _mm512_storeu_ps(out + i * stride + 16, b[i]);
    }
}

VBF16 static void finish_bfloat16(const float *first, const float *second, int turned, const float *bias, int64_t rows,
                                  uint16_t *out, int64_t stride) {
    __m512 a[16], b[16];
    in_order(first, second, turned, bias, a, b);
    for (int64_t i = 0; i < rows; i++) _mm512_storeu_si512(out + i * stride, (__m512i)_mm512_cvtne2ps_pbh(b[i], a[i]));
}

static int64_t padded(int64_t bytes) { return up(bytes, 4096) * 4096; }

/* Bytes for rows of a group, for sums that wait for the rest of their terms, and for a piece of the weight each thread.
   K words are summed, N features result. */
int64_t inlay_product4_workspace(int64_t M, int64_t K, int64_t N, int dtype, int threads) {
    const int64_t words = dtype == BFLOAT16 ? K / 2 : K, rows = least(up(M, 32) * 32, GROUP);
    return 64 + padded(rows * words * 4) + (words > CHUNK ? padded(rows * N * 4) : 0) + padded(N * 4)
        + threads * OWN;
}

/* O a multiple of 32, I and block of 64, all of x and out contiguous. */
V512 int inlay_product4(const void *x, int64_t M, const uint8_t *packed, int64_t O, int64_t I, int64_t block,
                        const float *book, const float *absmax, const uint8_t *codes, const float *map, int nested_shift,
                        float offset, const void *bias, void *out, int dtype, int backward, int form, char *workspace,
                        int threads) {
    const int bf16 = dtype == BFLOAT16, amx = form == AMX;
    if (I % 64 || O % 32 || block % 64 || (amx && !bf16)) return UNSUPPORTED;
    const weight_t w = {packed, codes, book, absmax, map, I, __builtin_ctzll((uint64_t)block), nested_shift, offset};
    if (block & (block - 1)) return UNSUPPORTED;
    const int64_t words = (backward ? O : I) / (bf16 ? 2 : 1), N = backward ? I : O, width = backward ? WIDTH(I) : 32;
    const int64_t most = least(up(M, 32) * 32, GROUP), chunks = up(words, CHUNK);
    char *at = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    uint32_t *rows_packed = (uint32_t *)at;
    at += padded(most * words * 4);
    float *waiting = (float *)at;
    at += chunks > 1 ? padded(most * N * 4) : 0;
    float *bias32 = bias ? (float *)at : 0;
    at += padded(N * 4);
    if (bias && bf16)
        for (int64_t n = 0; n < N; n++) { uint32_t b = (uint32_t)((const uint16_t *)bias)[n] << 16; memcpy(bias32 + n, &b, 4); }
    else if (bias)
        memcpy(bias32, bias, (size_t)N * 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        uint32_t *piece = (uint32_t *)(at + thread * OWN);
        float *own_sums = (float *)(at + thread * OWN + PIECE_BYTES);
        tiles_t before;
        if (amx) configure(&before);
        for (int64_t m0 = 0; m0 < M; m0 += GROUP) {
            const int64_t rows = least(M - m0, GROUP), twins = up(rows, 32);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < twins; j++) {
                const int64_t left = rows - 32 * j, tiles = left > 16 ? 2 : 1;
                for (int64_t s = 0; s < words / 16; s += 2)
                    for (int64_t h = 0; h < tiles; h++)
                        pack((const uint32_t *)x + (m0 + 32 * j + 16 * h) * words + 16 * s, words, least(left - 16 * h, 16),
                             s + 1 < words / 16, !backward, bf16, rows_packed + 32 * j * words + (s * tiles + h) * TILE, tiles * TILE);
            }
            for (int64_t k = 0; k < words; k += CHUNK) {
                const int64_t end = least(words, k + CHUNK), piece_words = backward ? PIECE_R : PIECE_L;
#pragma omp for schedule(static)
                for (int64_t n = 0; n < N / width; n++) {
                    float *panel = chunks > 1 ? waiting + n * width * most : own_sums;
                    for (int64_t p = k; p < end; p += piece_words) {
                        const int64_t steps = least(end - p, piece_words) / 16;
                        if (backward && bf16) decode_right_bfloat16(w, p, steps, n * width, width, piece);
                        else if (backward) decode_right_float32(w, p, steps, n * width, width, piece);
                        else if (bf16) decode_left_bfloat16(w, n * 32, p, steps, piece);
                        else decode_left_float32(w, n * 32, p, steps, piece);
                        for (int64_t half = 0; half < width / 32; half++)
                            for (int64_t j = 0; j < twins; j++) {
                                const int tiles = rows - 32 * j > 16 ? 2 : 1;
                                const uint32_t *acts = rows_packed + 32 * j * words + p * 16 * tiles;
                                const uint32_t *weights = piece + half * steps * 2 * TILE;
                                const uint32_t *a = backward ? acts : weights, *b = backward ? weights : acts;
                                const int as = backward ? tiles : 2, bs = backward ? 2 : tiles;
                                float *sums = panel + (half * twins + j) * 4 * TILE;
                                if (amx) kernel_amx(a, as, b, bs, steps, sums, p > 0);
                                else if (bf16) kernel_bfloat16(a, as, b, bs, steps, sums, p > 0);
                                else kernel_float32(a, as, b, bs, steps, sums, p > 0);
                            }
                    }
                    if (end < words) continue;
                    for (int64_t half = 0; half < width / 32; half++)
                        for (int64_t h = 0; h < up(rows, 16); h++) {
                            const float *first = panel + (half * twins + h / 2) * 4 * TILE + (h % 2) * (backward ? 2 : 1) * TILE;
                            const float *second = first + (backward ? 1 : 2) * TILE;
                            const int64_t column = n * width + half * 32, count = least(rows - 16 * h, 16);
                            const int64_t to = (m0 + 16 * h) * N + column;
                            const float *add = bias32 ? bias32 + column : 0;
                            if (bf16) finish_bfloat16(first, second, !backward, add, count, (uint16_t *)out + to, N);
                            else finish_float32(first, second, !backward, add, count, (float *)out + to, N);
                        }
                }
            }
        }
        if (amx) restore(&before);
    }
    return OK;
}

#endif
