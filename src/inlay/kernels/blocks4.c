/* Blockwise 4-bit quantisation and dequantisation on the CPU: the plain form is inlay/quant/blockwise.py, bit for bit.

   Compiled at run time by compiled.py with -ffp-contract=off: a fused multiply-add would change the nested scales. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { PLAIN = 0, VECTOR = 1 };
enum { OK = 0, UNSUPPORTED = 1 };

/* fp16 needs a compiler type; where there is none the caller falls back to torch for that dtype. */
#if defined(__FLT16_MAX__)
#define HAS_FLOAT16 1
#else
#define HAS_FLOAT16 0
#endif

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

/* Round to nearest even. Finite input: a quantised weight has no NaN. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t b = bits_of(x);
    return (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

#if HAS_FLOAT16
static inline uint16_t to_float16(float x) { _Float16 h = (_Float16)x; uint16_t b; memcpy(&b, &h, 2); return b; }
static inline float from_float16(uint16_t b) { _Float16 h; memcpy(&h, &b, 2); return (float)h; }
#else
static inline uint16_t to_float16(float x) { (void)x; return 0; }
static inline float from_float16(uint16_t b) { (void)b; return 0.0f; }
#endif

int inlay_has_vector(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

/* A block has sixteen possible results, so they are scaled and rounded once and then only looked up. */
static void lookup32(const uint8_t *in, int64_t n, const uint32_t *table, uint32_t *out) {
    for (int64_t i = 0; i < n / 2; i++) { out[2 * i] = table[in[i] >> 4]; out[2 * i + 1] = table[in[i] & 15]; }
    if (n & 1) out[n - 1] = table[in[n / 2] >> 4];
}

static void lookup16(const uint8_t *in, int64_t n, const uint16_t *table, uint16_t *out) {
    for (int64_t i = 0; i < n / 2; i++) { out[2 * i] = table[in[i] >> 4]; out[2 * i + 1] = table[in[i] & 15]; }
    if (n & 1) out[n - 1] = table[in[n / 2] >> 4];
}

#if defined(__x86_64__)
/* vpermd and vpermw look at the low four and five bits of an index, so shifting a nibble down is enough; the 16-bit
   table is held twice and the fifth bit does not matter. The order of shifts puts the high nibble first. */
AVX512 static int64_t lookup32_vector(const uint8_t *in, int64_t n, const uint32_t *table, uint32_t *out) {
    const __m512i entries = _mm512_loadu_si512(table);
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        int64_t eight; memcpy(&eight, in + i / 2, 8);
        __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(spread, _mm512_set1_epi64(eight)), shift);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(index, entries));
    }
    return i;
}

AVX512 static int64_t lookup16_vector(const uint8_t *in, int64_t n, const uint16_t *table, uint16_t *out) {
    const __m512i entries = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    const __m512i spread = _mm512_set_epi16(7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4,
                                            3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i shift = _mm512_set1_epi64(0x0008000c00000004);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(in + i / 2)));
        __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(spread, bytes), shift);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, entries));
    }
    return i;
}
#endif

static void decode_block(const uint8_t *in, int64_t n, const float *book, float scale, void *out, int64_t at,
                         int dtype, int vector) {
    if (dtype == FLOAT32) {
        uint32_t table[16], *to = (uint32_t *)out + at;
        for (int k = 0; k < 16; k++) table[k] = bits_of(book[k] * scale);
        int64_t done = 0;
#if defined(__x86_64__)
        if (vector) done = lookup32_vector(in, n, table, to);
#endif
        lookup32(in + done / 2, n - done, table, to + done);
    } else {
        uint16_t table[16], *to = (uint16_t *)out + at;
        for (int k = 0; k < 16; k++)
            table[k] = dtype == BFLOAT16 ? to_bfloat16(book[k] * scale) : to_float16(book[k] * scale);
        int64_t done = 0;
#if defined(__x86_64__)
        if (vector) done = lookup16_vector(in, n, table, to);
#endif
        lookup16(in + done / 2, n - done, table, to + done);
    }
    (void)vector;
}

/* out[i] = book[index i] * scale, for i in [0, n). scale of block b is absmax[b], or where codes is given
   map[codes[b]] * absmax[b / nested_block] + offset. */
int inlay_dequantize4(const uint8_t *packed, int64_t n, int64_t block, const float *book, const float *absmax,
                      const uint8_t *codes, const float *map, int64_t nested_block, float offset, void *out,
                      int dtype, int path, int threads) {
    if (dtype == FLOAT16 && !HAS_FLOAT16) return UNSUPPORTED;
    if (path == VECTOR && !inlay_has_vector()) return UNSUPPORTED;
    int64_t blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) {
        float scale = absmax[codes ? b / nested_block : b];
        if (codes) {
            float product = map[codes[b]] * scale;
            scale = product + offset;
        }
        int64_t at = b * block, count = n - at < block ? n - at : block;
        decode_block(packed + at / 2, count, book, scale, out, at, dtype, path == VECTOR);
    }
    return OK;
}

/* Whole blocks only: n is a multiple of block, block of 2. midpoints has 15 rising values, order the 16 indices by
   rising value. A NaN or infinity in a block reaches its absmax. */
int inlay_quantize4(const void *in, int dtype, int64_t n, int64_t block, const float *midpoints,
                    const uint8_t *order, float *absmax, uint8_t *packed, int threads) {
    if ((dtype == FLOAT16 && !HAS_FLOAT16) || block > 4096) return UNSUPPORTED;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < n / block; b++) {
        float x[4096];
        uint8_t rank[4096];
        if (dtype == FLOAT32) memcpy(x, (const float *)in + b * block, (size_t)block * 4);
        else if (dtype == BFLOAT16)
            for (int64_t i = 0; i < block; i++) x[i] = float_of((uint32_t)((const uint16_t *)in)[b * block + i] << 16);
        else
            for (int64_t i = 0; i < block; i++) x[i] = from_float16(((const uint16_t *)in)[b * block + i]);
        /* Magnitudes order like their bits, with NaN above infinity; an integer maximum vectorises. */
        int32_t largest = 0;
        for (int64_t i = 0; i < block; i++) {
            int32_t magnitude = (int32_t)(bits_of(x[i]) & 0x7fffffffu);
            largest = magnitude > largest ? magnitude : largest;
        }
        float scale = float_of((uint32_t)largest);
        absmax[b] = scale;
        float inverse = 1.0f / (scale < 1e-38f ? 1e-38f : scale);
        for (int64_t i = 0; i < block; i++) {
            float y = x[i] * inverse;
            int32_t above = 0;
            for (int k = 0; k < 15; k++) above += y > midpoints[k];
            rank[i] = (uint8_t)above;
        }
        for (int64_t i = 0; i < block / 2; i++)
            packed[b * block / 2 + i] = (uint8_t)(order[rank[2 * i]] << 4 | order[rank[2 * i + 1]]);
    }
    return OK;
}
