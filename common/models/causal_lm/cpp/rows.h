// What is done token by token: norms, rotation and storing of heads.
#pragma once

#include "numbers.h"

namespace {

// Starting threads takes longer than so few tokens do.
constexpr int ROWS_FOR_THREADS = 32;

// Root mean square norm of one row.
template <typename Element>
void norm_row(const Element *x, const float *weight, Element *out, int size, float epsilon) {
    float squares = 0;
    for (int i = 0; i < size; i++) squares += static_cast<float>(x[i]) * static_cast<float>(x[i]);
    const float factor = 1 / std::sqrt(squares / size + epsilon);
    for (int i = 0; i < size; i++) store(out + i, static_cast<float>(x[i]) * factor * weight[i]);
}

template <typename Element>
void norm(const Element *x, const float *weight, Element *out, int rows, int size, float epsilon) {
#pragma omp parallel for if (rows >= ROWS_FOR_THREADS)
    for (int row = 0; row < rows; row++)
        norm_row(x + static_cast<int64_t>(row) * size, weight, out + static_cast<int64_t>(row) * size, size, epsilon);
}

// Rotary embedding of one head: its first half against its second.
template <typename Element>
void turn_head(Element *head, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i++) {
        const float low = head[i], high = head[half + i];
        store(head + i, low * cos[i] - high * sin[i]);
        store(head + half + i, high * cos[i] + low * sin[i]);
    }
}

struct Heads {
    int query, key, dim;
    int64_t token_stride;  // of the pool, elements from one token's keys to the next one's
    int64_t value_offset;  // elements from a token's keys to its values

    int64_t row() const { return static_cast<int64_t>(query + 2 * key) * dim; }
};

// Norm (weight: [query + key, dim], or null) and turn a token's queries and keys in place, and store its keys and values.
template <typename Element>
void prepare_token(Element *own, const float *weight, float epsilon, const float *cos, const float *sin, Element *keys,
                   const Heads &heads) {
    const int turned = heads.query + heads.key, dim = heads.dim;
    for (int head = 0; head < turned; head++) {
        if (weight) norm_row(own + head * dim, weight + head * dim, own + head * dim, dim, epsilon);
        turn_head(own + head * dim, cos, sin, dim / 2);
    }
    std::memcpy(keys, own + heads.query * dim, sizeof(Element) * heads.key * dim);
    std::memcpy(keys + heads.value_offset, own + turned * dim, sizeof(Element) * heads.key * dim);
}

template <typename Element>
void prepare(Element *rows, const float *weight, float epsilon, const float *cos, const float *sin, const int64_t *slots,
             Element *pool, int tokens, const Heads &heads) {
    const int half = heads.dim / 2;
#pragma omp parallel for if (tokens >= ROWS_FOR_THREADS)
    for (int64_t token = 0; token < tokens; token++)
        prepare_token(rows + token * heads.row(), weight, epsilon, cos + token * half, sin + token * half,
                      pool + slots[token] * heads.token_stride, heads);
}

}  // namespace
