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

#define CHUNK 65536

/* out[i] = keep(i) ? in[i] * scale : 0, or out[i] += that. keep(i) is draw(i) >= threshold. n < 2^32. */
int inlay_dropout(const void *in, void *out, int64_t n, uint32_t low, uint32_t high, uint32_t threshold, float scale,
                  int dtype, int add, int threads) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t first = c * CHUNK, last = first + CHUNK < n ? first + CHUNK : n;
        if (dtype == FLOAT32) {
            const float *x = (const float *)in;
            float *y = (float *)out;
            if (add)
                for (int64_t i = first; i < last; i++)
                    y[i] += draw((uint32_t)i, low, high) >= threshold ? x[i] * scale : 0.0f;
            else
                for (int64_t i = first; i < last; i++)
                    y[i] = draw((uint32_t)i, low, high) >= threshold ? x[i] * scale : 0.0f;
        } else {
            const uint16_t *x = (const uint16_t *)in;
            uint16_t *y = (uint16_t *)out;
            if (add)
                for (int64_t i = first; i < last; i++)
                    y[i] = to_bfloat16(from_bfloat16(y[i])
                        + (draw((uint32_t)i, low, high) >= threshold ? from_bfloat16(x[i]) * scale : 0.0f));
            else
                for (int64_t i = first; i < last; i++)
                    y[i] = draw((uint32_t)i, low, high) >= threshold ? to_bfloat16(from_bfloat16(x[i]) * scale) : 0;
        }
    }
    return 0;
}
