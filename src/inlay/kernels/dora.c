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

/* y = z + gain (z - b), in fp32 and rounded once; rows x cols, row after row. */
int inlay_dora_forward(const void *z, const float *gain, const float *bias, void *y, int64_t rows, int64_t cols, int dtype,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (dtype == FLOAT32) {
            const float *in = (const float *)z + r * cols;
            float *out = (float *)y + r * cols;
            for (int64_t c = 0; c < cols; c++) out[c] = in[c] + gain[c] * (in[c] - bias[c]);
        } else {
            const uint16_t *in = (const uint16_t *)z + r * cols;
            uint16_t *out = (uint16_t *)y + r * cols;
            for (int64_t c = 0; c < cols; c++) {
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
                for (int64_t c = 0; c < count; c++) {
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
