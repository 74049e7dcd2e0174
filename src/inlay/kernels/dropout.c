/* Dropout whose mask is a function of a seed and the position, so that no mask need be kept: dropout.py has the plain
   form, bit for bit. */

#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* A counter hashed twice, the seed entering before each time: 32 bits for each position. */
static inline uint32_t mix(uint32_t h) {
    h ^= h >> 16; h *= 0x7feb352du;
    h ^= h >> 15; h *= 0x846ca68bu;
    return h ^ (h >> 16);
}

static inline uint32_t draw(uint32_t position, uint32_t low, uint32_t high) {
    return mix(mix(position ^ low) + high);
}

static inline float from_bfloat16(uint16_t x) { uint32_t b = (uint32_t)x << 16; float f; memcpy(&f, &b, 4); return f; }
static inline uint16_t to_bfloat16(float x) {
    uint32_t b; memcpy(&b, &x, 4);
    uint32_t nan = (b & 0x7fffffffu) > 0x7f800000u;
    return nan ? (uint16_t)((b >> 16) | 64) : (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

enum { CHUNK = 65536, STEP = 512 };

/* What each position is multiplied by: 0 or scale. Apart from the values, so that both loops vectorise. */
static void factors(float *to, int64_t first, int64_t count, uint32_t low, uint32_t high, uint32_t threshold, float scale) {
    for (int64_t i = 0; i < count; i++) to[i] = draw((uint32_t)(first + i), low, high) >= threshold ? scale : 0.0f;
}

/* out[i] = in[i] * factor(i), or out[i] += that. factor(i) is scale where draw(i) >= threshold. n < 2^32. */
int inlay_dropout(const void *in, void *out, int64_t n, uint32_t low, uint32_t high, uint32_t threshold, float scale,
                  int dtype, int add, int threads) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t end = (c + 1) * CHUNK < n ? (c + 1) * CHUNK : n;
        for (int64_t first = c * CHUNK; first < end; first += STEP) {
            const int64_t count = first + STEP < end ? STEP : end - first;
            float factor[STEP];
            factors(factor, first, count, low, high, threshold, scale);
            if (dtype == FLOAT32) {
                const float *x = (const float *)in + first;
                float *y = (float *)out + first;
                if (add) for (int64_t i = 0; i < count; i++) y[i] += x[i] * factor[i];
                else for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor[i];
            } else {
                const uint16_t *x = (const uint16_t *)in + first;
                uint16_t *y = (uint16_t *)out + first;
                if (add) for (int64_t i = 0; i < count; i++)
                    y[i] = to_bfloat16(from_bfloat16(y[i]) + from_bfloat16(x[i]) * factor[i]);
                else for (int64_t i = 0; i < count; i++) y[i] = to_bfloat16(from_bfloat16(x[i]) * factor[i]);
            }
        }
    }
    return 0;
}
