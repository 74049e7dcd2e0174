/* Blockwise 4-bit quantisation and dequantisation on the CPU: the plain form is inlay/quant/blockwise.py, bit for bit.

   Compiled at run time by compiled.py with -ffp-contract=off: a fused multiply-add would change the nested scales. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX2 __attribute__((target("avx2")))
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { PLAIN = 0, WITH_AVX2 = 1, WITH_AVX512 = 2 };
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

/* The best path that this processor has instructions for. */
int inlay_best_path(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq"))
        return WITH_AVX512;
    if (__builtin_cpu_supports("avx2")) return WITH_AVX2;
#endif
    return PLAIN;
}

/* Where the scales of a range of blocks come from: absmax[b], or map[codes[b]] * absmax[b >> nested_shift] + offset. */
typedef struct {
    const float *absmax, *map;
    const uint8_t *codes;
    int nested_shift;
    float offset;
} scales_t;

static inline float scale_of(const scales_t *s, int64_t b) {
    if (!s->codes) return s->absmax[b];
    float product = s->map[s->codes[b]] * s->absmax[b >> s->nested_shift];
    return product + s->offset;
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

static inline void scaled32(const float *book, float scale, uint32_t *table) {
    for (int k = 0; k < 16; k++) table[k] = bits_of(book[k] * scale);
}

static inline void scaled16(const float *book, float scale, int dtype, uint16_t *table) {
    for (int k = 0; k < 16; k++)
        table[k] = dtype == BFLOAT16 ? to_bfloat16(book[k] * scale) : to_float16(book[k] * scale);
}

static void decode_plain(const uint8_t *in, int64_t n, const float *book, float scale, void *out, int64_t at, int dtype) {
    if (dtype == FLOAT32) {
        uint32_t table[16];
        scaled32(book, scale, table);
        lookup32(in, n, table, (uint32_t *)out + at);
    } else {
        uint16_t table[16];
        scaled16(book, scale, dtype, table);
        lookup16(in, n, table, (uint16_t *)out + at);
    }
}

#if defined(__x86_64__)
/* Whole blocks [first, last). vpermd looks at the low three bits of an index, so the table is two halves and the fourth
   bit, moved to the sign, says which. */
AVX2 static void decode32_avx2(const uint8_t *packed, int64_t first, int64_t last, int64_t block, const float *book,
                               const scales_t *scales, uint32_t *out) {
    const __m256 low = _mm256_loadu_ps(book), high = _mm256_loadu_ps(book + 8);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t b = first; b < last; b++) {
        const __m256 scale = _mm256_set1_ps(scale_of(scales, b));
        const __m256 below = _mm256_mul_ps(low, scale), above = _mm256_mul_ps(high, scale);
        const uint8_t *in = packed + b * block / 2;
        uint32_t *to = out + b * block;
        for (int64_t i = 0; i < block; i += 8) {
            int32_t four;
            memcpy(&four, in + i / 2, 4);
            const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shift);
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            _mm256_storeu_ps((float *)(to + i), _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, index),
                                                                 _mm256_permutevar8x32_ps(above, index), upper));
        }
    }
}

/* The low and the high bytes of sixteen values are a table each for pshufb. */
AVX2 static void decode16_avx2(const uint8_t *packed, int64_t first, int64_t last, int64_t block, const float *book,
                               const scales_t *scales, uint16_t *out, int dtype) {
    const __m128i nibble = _mm_set1_epi8(15);
    for (int64_t b = first; b < last; b++) {
        uint16_t table[16];
        uint8_t bytes[2][16];
        scaled16(book, scale_of(scales, b), dtype, table);
        for (int k = 0; k < 16; k++) { bytes[0][k] = (uint8_t)table[k]; bytes[1][k] = (uint8_t)(table[k] >> 8); }
        const __m128i low = _mm_loadu_si128((const __m128i *)bytes[0]), high = _mm_loadu_si128((const __m128i *)bytes[1]);
        const uint8_t *in = packed + b * block / 2;
        __m128i *to = (__m128i *)(out + b * block);
        for (int64_t i = 0; i < block; i += 32, to += 4) {
            const __m128i pairs = _mm_loadu_si128((const __m128i *)(in + i / 2));
            const __m128i even = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble), odd = _mm_and_si128(pairs, nibble);
            const __m128i index[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
            for (int h = 0; h < 2; h++) {
                const __m128i lows = _mm_shuffle_epi8(low, index[h]), highs = _mm_shuffle_epi8(high, index[h]);
                _mm_storeu_si128(to + 2 * h, _mm_unpacklo_epi8(lows, highs));
                _mm_storeu_si128(to + 2 * h + 1, _mm_unpackhi_epi8(lows, highs));
            }
        }
    }
}

/* Whole blocks [first, last). vpermd and vpermw look at the low four and five bits of an index, so shifting a nibble
   down is enough; the 16-bit table is held twice and the fifth bit does not matter. The order of the shifts puts the
   high nibble first. */
AVX512 static void decode32_avx512(const uint8_t *packed, int64_t first, int64_t last, int64_t block, const float *book,
                                   const scales_t *scales, uint32_t *out) {
    const __m512 values = _mm512_loadu_ps(book);
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t b = first; b < last; b++) {
        const __m512i table = _mm512_castps_si512(_mm512_mul_ps(values, _mm512_set1_ps(scale_of(scales, b))));
        const uint8_t *in = packed + b * block / 2;
        uint32_t *to = out + b * block;
        for (int64_t i = 0; i < block; i += 16) {
            int64_t eight;
            memcpy(&eight, in + i / 2, 8);
            __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(spread, _mm512_set1_epi64(eight)), shift);
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi32(index, table));
        }
    }
}

AVX512 static void decode16_avx512(const uint8_t *packed, int64_t first, int64_t last, int64_t block, const float *book,
                                   const scales_t *scales, uint16_t *out, int dtype) {
    const __m512 values = _mm512_loadu_ps(book);
    const __m512i spread = _mm512_set_epi16(7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4,
                                            3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i shift = _mm512_set1_epi64(0x0008000c00000004);
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    for (int64_t b = first; b < last; b++) {
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(scale_of(scales, b)));
        __m256i entries;
        if (dtype == BFLOAT16) { /* to nearest even, in integers: vcvtneps2bf16 flushes denormals */
            __m512i bits = _mm512_castps_si512(scaled);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
            bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, half)), 16);
            entries = _mm512_cvtepi32_epi16(bits);
        } else {
            entries = _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        }
        const __m512i table = _mm512_broadcast_i64x4(entries);
        const uint8_t *in = packed + b * block / 2;
        uint16_t *to = out + b * block;
        for (int64_t i = 0; i < block; i += 32) {
            __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(in + i / 2)));
            __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(spread, bytes), shift);
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(index, table));
        }
    }
}
#endif

/* out[i] = book[index i] * scale of its block, for i in [0, n). Block sizes are multiples of 32. */
int inlay_dequantize4(const uint8_t *packed, int64_t n, int64_t block, const float *book, const float *absmax,
                      const uint8_t *codes, const float *map, int nested_shift, float offset, void *out, int dtype,
                      int path, int threads) {
    if (block % 32 || (dtype == FLOAT16 && !HAS_FLOAT16)) return UNSUPPORTED;
    if (path > inlay_best_path()) return UNSUPPORTED;
    const scales_t scales = {absmax, map, codes, nested_shift, offset};
    const int64_t blocks = n / block, chunk = (1 << 16) / block, chunks = (blocks + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < chunks; c++) {
        int64_t first = c * chunk, last = first + chunk < blocks ? first + chunk : blocks;
#if defined(__x86_64__)
        if (path == WITH_AVX512) {
            if (dtype == FLOAT32) decode32_avx512(packed, first, last, block, book, &scales, (uint32_t *)out);
            else decode16_avx512(packed, first, last, block, book, &scales, (uint16_t *)out, dtype);
            continue;
        }
        if (path == WITH_AVX2) {
            if (dtype == FLOAT32) decode32_avx2(packed, first, last, block, book, &scales, (uint32_t *)out);
            else decode16_avx2(packed, first, last, block, book, &scales, (uint16_t *)out, dtype);
            continue;
        }
#endif
        for (int64_t b = first; b < last; b++)
            decode_plain(packed + b * block / 2, block, book, scale_of(&scales, b), out, b * block, dtype);
    }
    if (n % block)
        decode_plain(packed + blocks * block / 2, n % block, book, scale_of(&scales, blocks), out, blocks * block, dtype);
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
