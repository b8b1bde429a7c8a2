// Attention of one new token of each of many sequences over paged keys and values.
//
// It reads everything once, in place and in the order in which it lies: tokens in tiles, in each tile all heads. Sums over
// tiles are kept by online softmax (Milakov and Gimelshein, 2018).
#pragma once

#include <vector>

#include "numbers.h"

namespace {

constexpr int TILE = 16;
constexpr int CACHE_LINE_BYTES = 64;
constexpr float LOWEST = -1e30f;

struct Shape {
    int64_t token_stride;  // elements from one token's keys to the next one's
    int64_t value_offset;  // elements from a token's keys to its values
    int group;             // query heads that share a key head
    int dim;
};

// What one query head has gathered so far: values weighted relative to the highest score.
struct Running {
    float *total;
    float highest = LOWEST;
    float weight = 0;
};

template <typename Element, int FIXED_DIM>
void add_tile(const float *__restrict query, const Element *keys, int count, const Shape &shape, Running &running) {
    const int dim = FIXED_DIM ? FIXED_DIM : shape.dim;
    float weights[TILE];
    float highest = running.highest;
    for (int token = 0; token < count; token++) {
        const Element *key = keys + token * shape.token_stride;
        float score = 0;
        for (int d = 0; d < dim; d++) score += query[d] * static_cast<float>(key[d]);
        weights[token] = score;
        highest = score > highest ? score : highest;
    }
    for (int token = count; token < TILE; token++) weights[token] = LOWEST;
    float added = 0;
    for (int token = 0; token < TILE; token++) {
        weights[token] = exponential(weights[token] - highest);
        added += weights[token];
    }
    const float shrink = exponential(running.highest - highest);
    float *__restrict total = running.total;
    for (int d = 0; d < dim; d++) total[d] *= shrink;
    for (int token = 0; token < count; token++) {
        const Element *value = keys + shape.value_offset + token * shape.token_stride;
        const float weight = weights[token];
        for (int d = 0; d < dim; d++) total[d] += weight * static_cast<float>(value[d]);
    }
    running.weight = running.weight * shrink + added;
    running.highest = highest;
}

// Some tokens of the tile after this one. Into the second cache, and between the heads of this tile: asked for all at once,
// or into the first cache, the lines wait for the few places that it has for lines on their way. Always inlined: GCC takes
// calls of a function that does nothing else for calls without effect, and leaves them out.
template <typename Element>
__attribute__((always_inline)) inline void prefetch(const Element *keys, int first, int end, int heads, const Shape &shape) {
    constexpr int step = CACHE_LINE_BYTES / sizeof(Element), READ = 0, SECOND_CACHE = 2;
    for (int token = TILE + first; token < TILE + end; token++) {
        const Element *next = keys + token * shape.token_stride;
        for (int element = 0; element < heads * shape.dim; element += step) {
            __builtin_prefetch(next + element, READ, SECOND_CACHE);
            __builtin_prefetch(next + shape.value_offset + element, READ, SECOND_CACHE);
        }
    }
}

// One sequence, `heads` of its key heads from the one on that `query` and `pool` point to.
template <typename Element, int FIXED_DIM>
void attend(const Element *query, const Element *pool, const int64_t *span, const int64_t *spans_end, Element *out,
            int heads, const Shape &shape, float scale) {
    const int query_heads = heads * shape.group, size = query_heads * shape.dim;
    std::vector<float> scaled(size), totals(size);
    std::vector<Running> running(query_heads);
    for (int i = 0; i < size; i++) scaled[i] = scale * static_cast<float>(query[i]);
    for (int head = 0; head < query_heads; head++) running[head].total = &totals[head * shape.dim];
    for (; span < spans_end; span += 2) {
        for (int64_t slot = span[0]; slot < span[1]; slot += TILE) {
            const int count = span[1] - slot < TILE ? static_cast<int>(span[1] - slot) : TILE;
            const Element *tile = pool + slot * shape.token_stride;
            for (int head = 0; head < query_heads; head++) {
                prefetch(tile, head * TILE / query_heads, (head + 1) * TILE / query_heads, heads, shape);
                add_tile<Element, FIXED_DIM>(&scaled[head * shape.dim], tile + head / shape.group * shape.dim, count,
                                             shape, running[head]);
            }
        }
    }
    for (int head = 0; head < query_heads; head++)
        for (int d = 0; d < shape.dim; d++)
            store(out + head * shape.dim + d, running[head].total[d] / running[head].weight);
}

// `attend` for heads of this size: of the usual ones, one that knows it when it is compiled.
template <typename Element>
auto attend_for(int dim) {
    return dim == 64 ? attend<Element, 64> : dim == 128 ? attend<Element, 128> : attend<Element, 0>;
}

template <typename Element>
void attend_all(const Element *query, int64_t query_stride, const int64_t *rows, const Element *pool,
                const int64_t *spans, const int64_t *first_span, Element *out, int sequences, int kv_heads, int parts,
                Shape shape, float scale) {
    const int heads = kv_heads / parts;
    const int64_t row_size = static_cast<int64_t>(kv_heads) * shape.group * shape.dim;
    const auto one = attend_for<Element>(shape.dim);
#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < sequences * parts; task++) {
        const int sequence = task / parts, first_head = task % parts * heads;
        const int64_t offset = static_cast<int64_t>(first_head) * shape.group * shape.dim;
        one(query + rows[sequence] * query_stride + offset, pool + first_head * shape.dim,
            spans + 2 * first_span[sequence], spans + 2 * first_span[sequence + 1],
            out + rows[sequence] * row_size + offset, heads, shape, scale);
    }
}

}  // namespace
