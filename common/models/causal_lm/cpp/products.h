// Products of rows with weights that lie as they are read: panels of 32 outputs, in a panel input by input (in bfloat16
// two by two), all 32 outputs of each. Every sum goes over the inputs in order, so a row's result does not depend on how
// many rows there are.
#pragma once

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int PANEL = 32;
// Rows that share one reading of a panel: their sums fill 24 of the 32 registers.
constexpr int STRIP = 12;

// How weights of a type are packed; 0: this processor has no instructions for their products.
template <typename Element>
constexpr int PAIR = 0;

#ifdef __AVX512F__
template <>
constexpr int PAIR<float> = 1;

inline __m512 load_weights(const float *weights) { return _mm512_loadu_ps(weights); }
inline __m512 repeat(const float *x) { return _mm512_set1_ps(*x); }
inline __m512 add_products(__m512 sums, __m512 x, __m512 weights) { return _mm512_fmadd_ps(x, weights, sums); }
#endif

#ifdef __AVX512BF16__
template <>
constexpr int PAIR<BFloat16> = 2;

inline __m512bh load_weights(const BFloat16 *weights) { return (__m512bh)_mm512_loadu_si512(weights); }

inline __m512bh repeat(const BFloat16 *x) {
    int32_t both;
    std::memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

inline __m512 add_products(__m512 sums, __m512bh x, __m512bh weights) { return _mm512_dpbf16_ps(sums, x, weights); }
#endif

// A row of sums as numbers of the type.
template <typename Element>
inline void store_all(Element *to, const float *from, int count) {
    int place = 0;
#ifdef __AVX512BF16__
    if constexpr (sizeof(Element) == sizeof(BFloat16))
        for (; place + 16 <= count; place += 16)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + place),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + place)));
#endif
    for (; place < count; place++) store(to + place, from[place]);
}

#ifdef __AVX512F__
template <typename Element, int ROWS>
void strip(const Element *x, const Element *panel, int size, float (*out)[PANEL]) {
    constexpr int pair = PAIR<Element>;
    __m512 sums[ROWS][2];
    for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (int input = 0; input < size; input += pair, panel += PANEL * pair) {
        const auto low = load_weights(panel), high = load_weights(panel + PANEL / 2 * pair);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const auto own = repeat(x + static_cast<int64_t>(row) * size + input);
            sums[row][0] = add_products(sums[row][0], own, low);
            sums[row][1] = add_products(sums[row][1], own, high);
        }
    }
    for (int row = 0; row < ROWS; row++) {
        _mm512_storeu_ps(out[row], sums[row][0]);
        _mm512_storeu_ps(out[row] + PANEL / 2, sums[row][1]);
    }
}
#endif

// The strip for a number of rows that is known only when it runs.
template <typename Element, int ROWS>
struct Strips {
    static void run(int rows, const Element *x, const Element *panel, int size, float (*out)[PANEL]) {
#ifdef __AVX512F__
        if constexpr (PAIR<Element> > 0 && ROWS > 0) {
            if (rows == ROWS)
                strip<Element, ROWS>(x, panel, size, out);
            else
                Strips<Element, ROWS - 1>::run(rows, x, panel, size, out);
        }
#endif
        // Without these instructions nobody asks: see PAIR.
        (void)rows, (void)x, (void)panel, (void)size, (void)out;
    }
};

// A panel's outputs of up to STRIP rows of x: [rows, size].
template <typename Element>
void multiply(const Element *x, int rows, int size, const Element *panel, float (*sums)[PANEL]) {
    Strips<Element, STRIP>::run(rows, x, panel, size, sums);
}

}  // namespace
