/* The passes over the output of a projection under DoRA: dora.py has the plain form. */

#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, STRIP = 1024 };

static inline float from_bfloat16(uint16_t x) { uint32_t b = (uint32_t)x << 16; float f; memcpy(&f, &b, 4); return f; }
static inline uint16_t to_bfloat16(float x) {
    uint32_t b; memcpy(&b, &x, 4);
    uint32_t nan = (b & 0x7fffffffu) > 0x7f800000u;
    return nan ? (uint16_t)((b >> 16) | 64) : (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

static int vectors(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

AVX512 static inline __m512 widened(const uint16_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
AVX512 static inline void put(uint16_t *to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* One row of the pass forward, 32 values at a time; how many were done. */
AVX512 static int64_t forward_vectors(const uint16_t *in, const float *gain, const float *bias, uint16_t *out, int64_t cols) {
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32) {
        const __m512 a = widened(in + c), b = widened(in + c + 16);
        put(out + c, _mm512_fmadd_ps(_mm512_loadu_ps(gain + c), _mm512_sub_ps(a, _mm512_loadu_ps(bias + c)), a),
            _mm512_fmadd_ps(_mm512_loadu_ps(gain + c + 16), _mm512_sub_ps(b, _mm512_loadu_ps(bias + c + 16)), b));
    }
    return c;
}

/* One row of the pass backward. */
AVX512 static int64_t backward_vectors(const uint16_t *g, const uint16_t *v, const float *ratio, const float *shift,
                                       float *total, uint16_t *out, int64_t cols) {
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32) {
        const __m512 a = widened(g + c), b = widened(g + c + 16);
        const __m512 p = _mm512_sub_ps(widened(v + c), _mm512_loadu_ps(shift + c));
        const __m512 q = _mm512_sub_ps(widened(v + c + 16), _mm512_loadu_ps(shift + c + 16));
        _mm512_storeu_ps(total + c, _mm512_fmadd_ps(a, p, _mm512_loadu_ps(total + c)));
        _mm512_storeu_ps(total + c + 16, _mm512_fmadd_ps(b, q, _mm512_loadu_ps(total + c + 16)));
        put(out + c, _mm512_mul_ps(a, _mm512_loadu_ps(ratio + c)), _mm512_mul_ps(b, _mm512_loadu_ps(ratio + c + 16)));
    }
    return c;
}
#else
static int vectors(void) { return 0; }
static int64_t forward_vectors(const uint16_t *in, const float *gain, const float *bias, uint16_t *out, int64_t cols) {
    (void)in; (void)gain; (void)bias; (void)out; (void)cols;
    return 0;
}
static int64_t backward_vectors(const uint16_t *g, const uint16_t *v, const float *ratio, const float *shift,
                                float *total, uint16_t *out, int64_t cols) {
    (void)g; (void)v; (void)ratio; (void)shift; (void)total; (void)out; (void)cols;
    return 0;
}
#endif

/* y = z + gain (z - b), in fp32 and rounded once; rows x cols, row after row. */
int inlay_dora_forward(const void *z, const float *gain, const float *bias, void *y, int64_t rows, int64_t cols, int dtype,
                       int threads) {
    const int quick = vectors();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (dtype == FLOAT32) {
            const float *in = (const float *)z + r * cols;
            float *out = (float *)y + r * cols;
            for (int64_t c = 0; c < cols; c++) out[c] = in[c] + gain[c] * (in[c] - bias[c]);
        } else {
            const uint16_t *in = (const uint16_t *)z + r * cols;
            uint16_t *out = (uint16_t *)y + r * cols;
            for (int64_t c = quick ? forward_vectors(in, gain, bias, out, cols) : 0; c < cols; c++) {
                float v = from_bfloat16(in[c]);
                out[c] = to_bfloat16(v + gain[c] * (v - bias[c]));
            }
        }
    }
    return 0;
}

/* dz = dy (1 + gain) and sum[c] = the sum over the rows of dy (z - b), a strip of columns at a time. */
int inlay_dora_backward(const void *dy, const void *z, const float *gain, const float *bias, void *dz, float *sum,
                        int64_t rows, int64_t cols, int dtype, int threads) {
    const int quick = vectors();
    const int64_t strips = (cols + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < strips; s++) {
        const int64_t at = s * STRIP, count = at + STRIP < cols ? STRIP : cols - at;
        float total[STRIP] = {0}, shift[STRIP], ratio[STRIP];
        for (int64_t c = 0; c < count; c++) { shift[c] = bias[at + c]; ratio[c] = 1.0f + gain[at + c]; }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = r * cols + at;
            if (dtype == FLOAT32) {
                const float *g = (const float *)dy + row, *v = (const float *)z + row;
                float *out = (float *)dz + row;
                for (int64_t c = 0; c < count; c++) { total[c] += g[c] * (v[c] - shift[c]); out[c] = g[c] * ratio[c]; }
            } else {
                const uint16_t *g = (const uint16_t *)dy + row, *v = (const uint16_t *)z + row;
                uint16_t *out = (uint16_t *)dz + row;
                for (int64_t c = quick ? backward_vectors(g, v, ratio, shift, total, out, count) : 0; c < count; c++) {
                    float d = from_bfloat16(g[c]);
                    total[c] += d * (from_bfloat16(v[c]) - shift[c]);
                    out[c] = to_bfloat16(d * ratio[c]);
                }
            }
        }
        memcpy(sum + at, total, (size_t)count * sizeof(float));
    }
    return 0;
}
