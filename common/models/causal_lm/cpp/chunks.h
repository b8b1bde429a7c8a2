// Attention of chunks of several tokens over paged keys and values: blocks of queries against tiles of keys, both products
// by the strips of products.h, sums over tiles by online softmax.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "products.h"

namespace {

// Keys of a tile; two panels of scores.
constexpr int KEYS = 2 * PANEL;
// Queries that share one packing of a tile, as far as tokens are not split.
constexpr int QUERIES = 8 * STRIP;

// Walks over a sequence's slots in order; spans: slots from, up to, of each run.
class Walk {
  public:
    explicit Walk(const int64_t *span) : span_(span), slot_(*span) {}

    int64_t next() {
        if (slot_ == span_[1]) {
            span_ += 2;
            slot_ = *span_;
        }
        return slot_++;
    }

    void skip(int64_t tokens) {
        for (; tokens > span_[1] - slot_; slot_ = *span_) {
            tokens -= span_[1] - slot_;
            span_ += 2;
        }
        slot_ += tokens;
    }

  private:
    const int64_t *span_;
    int64_t slot_;
};

// Tokens `first` to `first` + `count` of a chunk, which begins at position `start`. `span`: where the tokens from position
// `low` on lie; window: how many of them each token sees, itself included, 0: all.
struct Block {
    int64_t start, first;
    int count;
    const int64_t *span;
    int64_t low, window;
};

// A tile's keys as a panel of weights for queries, and its values as one for scores; what is beyond it is zero.
template <typename Element>
class PackedTile {
  public:
    explicit PackedTile(int dim)
        : dim_(dim), width_((dim + PANEL - 1) / PANEL * PANEL), keys_(KEYS * dim), values_(KEYS * width_), nothing_(dim) {}

    int width() const { return width_; }
    const Element *keys(int panel) const { return &keys_[panel * PANEL * dim_]; }
    const Element *values(int panel) const { return &values_[panel * PANEL * KEYS]; }

    // `tokens`: each one's keys, `count` of them.
    void pack(const Element *const *tokens, int count, int64_t value_offset) {
        constexpr int pair = PAIR<Element> ? PAIR<Element> : 1;
        if (count < KEYS) std::fill(keys_.begin(), keys_.end(), Element{});
        for (int token = 0; token < count; token++) {
            Element *to = &keys_[token / PANEL * PANEL * dim_ + token % PANEL * pair];
            for (int d = 0; d < dim_; d += pair, to += PANEL * pair)
                std::memcpy(to, tokens[token] + d, pair * sizeof(Element));
        }
        for (int token = 0; token < KEYS; token += pair) {
            const Element *rows[2];
            for (int one = 0; one < 2; one++)
                rows[one] = token + one < count ? tokens[token + one] + value_offset : nothing_.data();
            for (int first = 0; first < dim_; first += PANEL)
                side_by_side<pair>(rows[0] + first, rows[1] + first, std::min(PANEL, dim_ - first),
                                   &values_[(first * KEYS + token * PANEL)]);
        }
    }

  private:
    const int dim_, width_;
    std::vector<Element> keys_, values_, nothing_;

    template <int COUNT>
    static void side_by_side(const Element *one, const Element *other, int count, Element *to) {
        for (int d = 0; d < count; d++) {
            to[d * COUNT] = one[d];
            if (COUNT == 2) to[d * COUNT + 1] = other[d];
        }
    }
};

// Scores of one row become weights relative to the highest so far; returns by what earlier sums shrink.
template <typename Element>
float soften(float *scores, int low, int high, float scale, Running &running, Element *weights) {
    for (int key = 0; key < KEYS; key++) scores[key] = key >= low && key < high ? scores[key] * scale : LOWEST;
    float highest = running.highest;
    for (int key = 0; key < KEYS; key++) highest = scores[key] > highest ? scores[key] : highest;
    float added = 0;
    for (int key = 0; key < KEYS; key++) {
        // A row that sees nothing of the tile has no weights there.
        scores[key] = scores[key] > LOWEST ? exponential(scores[key] - highest) : 0;
        added += scores[key];
    }
    store_all(weights, scores, KEYS);
    const float shrink = exponential(running.highest - highest);
    running.weight = running.weight * shrink + added;
    running.highest = highest;
    return shrink;
}

// A block's queries of one key head. query: of the chunk's first token and the group's first head; `row` from token to token,
// out: the same, `out_row` from token to token. pool: the key head's of slot 0.
template <typename Element>
void attend_block(const Element *query, int64_t row, const Element *pool, const Block &block, Element *out,
                  int64_t out_row, const Shape &shape, float scale) {
    const int dim = shape.dim, group = shape.group, rows = block.count * group;
    PackedTile<Element> tile(dim);
    const int width = tile.width();
    std::vector<Element> queries(static_cast<size_t>(rows) * dim);
    std::vector<float> totals(static_cast<size_t>(rows) * width);
    std::vector<Running> running(rows);
    for (int token = 0; token < block.count; token++)
        std::memcpy(&queries[token * group * dim], query + (block.first + token) * row, sizeof(Element) * group * dim);
    const int64_t end = block.start + block.first + block.count;
    const int64_t begin = block.window ? std::max(block.low, block.start + block.first - block.window + 1) : block.low;
    Walk walk(block.span);
    walk.skip(begin - block.low);
    for (int64_t position = begin; position < end; position += KEYS) {
        const Element *tokens[KEYS];
        const int count = end - position < KEYS ? static_cast<int>(end - position) : KEYS;
        for (int token = 0; token < count; token++) tokens[token] = pool + walk.next() * shape.token_stride;
        tile.pack(tokens, count, shape.value_offset);
        for (int first = 0; first < rows; first += STRIP) {
            const int members = std::min(STRIP, rows - first);
            alignas(64) float sums[2][STRIP][PANEL], scores[KEYS];
            alignas(64) Element weights[STRIP * KEYS];
            for (int panel = 0; panel < 2; panel++)
                multiply(&queries[first * dim], members, dim, tile.keys(panel), sums[panel]);
            for (int place = 0; place < members; place++) {
                const int64_t own = block.start + block.first + (first + place) / group - position;
                const int64_t low = block.window ? std::max<int64_t>(0, own - block.window + 1) : 0;
                std::memcpy(scores, sums[0][place], sizeof sums[0][place]);
                std::memcpy(scores + PANEL, sums[1][place], sizeof sums[1][place]);
                const float shrink =
                    soften(scores, static_cast<int>(std::min<int64_t>(low, KEYS)),
                           static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(own + 1, KEYS))), scale,
                           running[first + place], weights + place * KEYS);
                float *total = &totals[(first + place) * width];
                for (int d = 0; d < width; d++) total[d] *= shrink;
            }
            for (int panel = 0; panel < width / PANEL; panel++) {
                multiply(weights, members, KEYS, tile.values(panel), sums[0]);
                for (int place = 0; place < members; place++) {
                    float *total = &totals[(first + place) * width + panel * PANEL];
                    for (int d = 0; d < PANEL; d++) total[d] += sums[0][place][d];
                }
            }
        }
    }
    for (int place = 0; place < rows; place++) {
        Element *to = out + (block.first + place / group) * out_row + place % group * dim;
        float *total = &totals[place * width];
        const float share = 1 / running[place].weight;
        for (int d = 0; d < width; d++) total[d] *= share;
        store_all(to, total, dim);
    }
}

}  // namespace
