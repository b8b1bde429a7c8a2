// What a decoder does on a CPU, piece by piece or as a whole. Compiled with -ffast-math: infinities do not occur.

#include "attention.h"
#include "decoder.h"
#include "rows.h"

// Each for float32 and bfloat16.
//
// attend: query: [tokens, kv_heads * group, dim], `query_stride` elements from token to token; out: the same, packed.
// rows: [sequences], which tokens are meant. pool: keys of slot 0. spans: slots from, up to, of each run of a sequence's
// tokens; those of sequence s are first_span[s] to first_span[s + 1]. parts: of the key heads, for threads to share.
//
// norm: x, out: [rows, size]; weight: [size].
//
// prepare: heads: [tokens, query_heads + 2 * kv_heads, dim], queries, keys and values. Queries and keys are normed head by
// head (weight: [query_heads + kv_heads, dim], or null) and turned (cos, sin: [tokens, dim / 2]) in place; keys and values
// are written to the tokens' slots of the pool.
#define EXPORT(NAME, ELEMENT)                                                                                          \
    void attend_##NAME(const ELEMENT *query, int64_t query_stride, const int64_t *rows, const ELEMENT *pool,           \
                       const int64_t *spans, const int64_t *first_span, ELEMENT *out, int sequences, int kv_heads,     \
                       int parts, int group, int dim, int64_t token_stride, int64_t value_offset, float scale) {       \
        attend_all(query, query_stride, rows, pool, spans, first_span, out, sequences, kv_heads, parts,                \
                   {token_stride, value_offset, group, dim}, scale);                                                   \
    }                                                                                                                  \
    void norm_##NAME(const ELEMENT *x, const float *weight, ELEMENT *out, int rows, int size, float epsilon) {         \
        norm(x, weight, out, rows, size, epsilon);                                                                     \
    }                                                                                                                  \
    void prepare_##NAME(ELEMENT *heads, const float *weight, float epsilon, const float *cos, const float *sin,        \
                        const int64_t *slots, ELEMENT *pool, int tokens, int query_heads, int kv_heads, int dim,       \
                        int64_t token_stride, int64_t value_offset) {                                                  \
        prepare(heads, weight, epsilon, cos, sin, slots, pool, tokens,                                                 \
                {query_heads, kv_heads, dim, token_stride, value_offset});                                             \
    }                                                                                                                  \
    int pair_##NAME() { return PAIR<ELEMENT>; }                                                                        \
    void layers_##NAME(const Model *model, const Layer *layers, const Pass *pass, int first, int end) {                \
        run_layers<ELEMENT>(*model, layers, *pass, first, end);                                                        \
    }                                                                                                                  \
    void product_##NAME(const ELEMENT *x, const ELEMENT *weights, const float *bias, float *out, int rows, int size,   \
                        int outputs) {                                                                                 \
        run_product(x, weights, bias, out, rows, size, outputs);                                                       \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
