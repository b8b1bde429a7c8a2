// What a decoder layer does between its matrix products, on a CPU: norms, rotation and storing of heads, and attention of
// one new token of each of many sequences over paged keys and values.
//
// Attention reads everything once, in place and in the order in which it lies: tokens in tiles, in each tile all heads.
// Sums over tiles are kept by online softmax (Milakov and Gimelshein, 2018). Compiled with -ffast-math: infinities do not
// occur. All sums are float32.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int TILE = 16;
constexpr int CACHE_LINE_BYTES = 64;
// Starting threads takes longer than so few tokens do.
constexpr int ROWS_FOR_THREADS = 32;
constexpr float LOWEST = -1e30f;

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

void store(float *to, float value) { *to = value; }

void store(BFloat16 *to, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    to->bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// e to the x for x up to 0, in a form that compilers make vectors of: 2^n times a polynomial (Taylor's) of what is left,
// which is at most ln(2) / 2. Below the smallest normal number it stays there.
float exponential(float x) {
    constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, SMALLEST = -87.0f;
    x = x < SMALLEST ? SMALLEST : x;
    const float n = std::nearbyint(x * LOG2_E);
    const float r = x - n * LN2_HIGH - n * LN2_LOW;
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

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

template <typename Element>
void prefetch(const Element *keys, int heads, const Shape &shape) {
    constexpr int step = CACHE_LINE_BYTES / sizeof(Element);
    for (int token = 0; token < TILE; token++) {
        const Element *next = keys + token * shape.token_stride;
        for (int element = 0; element < heads * shape.dim; element += step) {
            __builtin_prefetch(next + element);
            __builtin_prefetch(next + shape.value_offset + element);
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
            prefetch(tile + TILE * shape.token_stride, heads, shape);
            for (int head = 0; head < query_heads; head++)
                add_tile<Element, FIXED_DIM>(&scaled[head * shape.dim], tile + head / shape.group * shape.dim, count,
                                             shape, running[head]);
        }
    }
    for (int head = 0; head < query_heads; head++)
        for (int d = 0; d < shape.dim; d++)
            store(out + head * shape.dim + d, running[head].total[d] / running[head].weight);
}

template <typename Element>
void attend_all(const Element *query, int64_t query_stride, const int64_t *rows, const Element *pool,
                const int64_t *spans, const int64_t *first_span, Element *out, int sequences, int kv_heads, int parts,
                Shape shape, float scale) {
    const int heads = kv_heads / parts;
    const int64_t row_size = static_cast<int64_t>(kv_heads) * shape.group * shape.dim;
    auto one = shape.dim == 64 ? attend<Element, 64> : shape.dim == 128 ? attend<Element, 128> : attend<Element, 0>;
#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < sequences * parts; task++) {
        const int sequence = task / parts, first_head = task % parts * heads;
        const int64_t offset = static_cast<int64_t>(first_head) * shape.group * shape.dim;
        one(query + rows[sequence] * query_stride + offset, pool + first_head * shape.dim,
            spans + 2 * first_span[sequence], spans + 2 * first_span[sequence + 1],
            out + rows[sequence] * row_size + offset, heads, shape, scale);
    }
}

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

template <typename Element>
void prepare(Element *heads, const float *weight, float epsilon, const float *cos, const float *sin,
             const int64_t *slots, Element *pool, int tokens, int query_heads, int kv_heads, int dim,
             int64_t token_stride, int64_t value_offset) {
    const int turned = query_heads + kv_heads, half = dim / 2;
#pragma omp parallel for if (tokens >= ROWS_FOR_THREADS)
    for (int token = 0; token < tokens; token++) {
        Element *own = heads + static_cast<int64_t>(token) * (turned + kv_heads) * dim;
        for (int head = 0; head < turned; head++) {
            if (weight) norm_row(own + head * dim, weight + head * dim, own + head * dim, dim, epsilon);
            turn_head(own + head * dim, cos + static_cast<int64_t>(token) * half, sin + static_cast<int64_t>(token) * half,
                      half);
        }
        Element *keys = pool + slots[token] * token_stride;
        std::memcpy(keys, own + query_heads * dim, sizeof(Element) * kv_heads * dim);
        std::memcpy(keys + value_offset, own + turned * dim, sizeof(Element) * kv_heads * dim);
    }
}

}  // namespace

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
        prepare(heads, weight, epsilon, cos, sin, slots, pool, tokens, query_heads, kv_heads, dim, token_stride,       \
                value_offset);                                                                                         \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)
}
