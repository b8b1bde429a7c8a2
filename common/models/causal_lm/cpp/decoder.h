// The decoder of Llama and its close relatives: layers of attention and a gated product, over packed weights. A team of
// threads goes through all of it together, so that threads are woken once, not once for each operation.
#pragma once

#include <omp.h>

#include "attention.h"
#include "chunks.h"
#include "products.h"
#include "rows.h"
#include "team.h"

// As native.py describes them to ctypes; sizes in elements.
struct Model {
    int hidden, inner, query_heads, key_heads, dim, activation;
    float epsilon, scale;
    int64_t token_stride, layer_stride, value_offset;
    const float *cos, *sin;  // [positions, dim / 2]
};

// Norms and biases are float32; a bias may be null, and so may the norm of heads. window: how many tokens one sees, 0: all.
struct Layer {
    int64_t window;
    const float *before, *between, *heads;
    const void *qkv, *out, *gate_up, *down;
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
};

// What one pass is about: chunks, packed one behind the other. chunk: [chunks + 1], each one's first token. Of each layer,
// `spans` and `first_span` tell as for attend where that lies which any token of a chunk sees.
struct Pass {
    int tokens, chunks;
    const int64_t *positions, *slots, *chunk;
    void *hidden, *normed, *heads, *attended, *inner, *pool;
    const int64_t *const *spans;
    const int64_t *const *first_span;
};

namespace {

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

// Rows whose reading of a panel is one task: few enough that they stay in the cache of one core.
constexpr int TASK_ROWS = 20 * STRIP;

inline float logistic(float x) {
    const float small = exponential(x < 0 ? x : -x);
    return (x < 0 ? small : 1.0f) / (1 + small);
}

template <int ACTIVATION>
inline float activate(float x) {
    if (ACTIVATION == SILU) return x * logistic(x);
    if (ACTIVATION == GELU) return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    return x * logistic(1.5957691f * (x + 0.044715f * x * x * x));
}

// A task of attention: `count` tokens of a chunk from its token `first` on, `heads` key heads from `head` on.
struct Part {
    int chunk, first, count, head, heads;
    bool single;
    int64_t cost;
};

// The parts of a pass, the largest first, so that none is left to one thread in the end.
inline std::vector<Part> parts_of(const Model &model, const Pass &pass, int threads) {
    std::vector<Part> parts;
    const bool few = pass.chunks < 4 * threads;
    const int shares = !few ? 1 : model.key_heads % threads ? model.key_heads : threads;
    const int heads = model.key_heads / shares, tokens = std::max(1, QUERIES * model.key_heads / model.query_heads);
    for (int chunk = 0; chunk < pass.chunks; chunk++) {
        const int count = static_cast<int>(pass.chunk[chunk + 1] - pass.chunk[chunk]);
        const int64_t start = pass.positions[pass.chunk[chunk]];
        if (count == 1)
            for (int head = 0; head < model.key_heads; head += heads)
                parts.push_back({chunk, 0, 1, head, heads, true, heads * (start + 1)});
        for (int first = 0; count > 1 && first < count; first += tokens) {
            const int own = std::min(tokens, count - first);
            for (int head = 0; head < model.key_heads; head++)
                parts.push_back({chunk, first, own, head, 1, false, own * (start + first + own)});
        }
    }
    std::stable_sort(parts.begin(), parts.end(), [](const Part &one, const Part &other) { return one.cost > other.cost; });
    return parts;
}

// A panel's gates, and beside them what passes through: PANEL / 2 of each. Always all of them, as vectors.
template <int ACTIVATION, typename Element>
void gate(const float *sums, const float *bias, Element *out) {
    constexpr int half = PANEL / 2;
    alignas(64) float gates[half], passed[half];
    for (int i = 0; i < half; i++) gates[i] = sums[i] + (bias ? bias[i] : 0);
    for (int i = 0; i < half; i++) passed[i] = sums[half + i] + (bias ? bias[half + i] : 0);
#pragma omp simd
    for (int i = 0; i < half; i++) passed[i] *= activate<ACTIVATION>(gates[i]);
    store_all(out, passed, half);
}

// `finish` is given a row, the first output, how many there are, and their sums.
template <typename Element, typename Finish>
void share_product(Team &team, const Element *x, int rows, int size, const Element *weights, int64_t outputs,
                   const Finish &finish) {
    const int panels = static_cast<int>((outputs + PANEL - 1) / PANEL);
    // Many rows' outputs are written several panels wide: narrow columns of wide rows would share few cache sets.
    const int width = rows > STRIP ? 4 : 1;
    const int columns = (panels + width - 1) / width, groups = (rows + TASK_ROWS - 1) / TASK_ROWS;
    team.share(columns * groups, [&](int task) {
        const int from = task / columns * TASK_ROWS, end = from + TASK_ROWS < rows ? from + TASK_ROWS : rows;
        const int low = task % columns * width, high = low + width < panels ? low + width : panels;
        for (int row = from; row < end; row += STRIP) {
            const int count = end - row < STRIP ? end - row : STRIP;
            for (int64_t panel = low; panel < high; panel++) {
                const int64_t first = panel * PANEL, left = outputs - first;
                alignas(64) float sums[STRIP][PANEL];
                multiply(x + static_cast<int64_t>(row) * size, count, size, weights + first * size, sums);
                for (int place = 0; place < count; place++)
                    finish(row + place, first, left < PANEL ? static_cast<int>(left) : PANEL, sums[place]);
            }
        }
    });
}

template <typename Element>
class Decoder {
  public:
    Decoder(const Model &model, const Pass &pass, Team &team)
        : model_(model), pass_(pass), team_(team),
          heads_{model.query_heads, model.key_heads, model.dim, model.token_stride, model.value_offset},
          hidden_(static_cast<Element *>(pass.hidden)), normed_(static_cast<Element *>(pass.normed)),
          own_(static_cast<Element *>(pass.heads)), attended_(static_cast<Element *>(pass.attended)),
          inner_(static_cast<Element *>(pass.inner)) {}

    // Up to where a layer's keys and values are stored and its queries are ready.
    void begin(const Layer &layer, int number) const {
        norm(layer.before);
        const int64_t row = heads_.row();
        product(normed_, model_.hidden, layer.qkv, row, [&](int token, int64_t first, int count, const float *sums) {
            Element *to = own_ + token * row + first;
            const float *bias = layer.qkv_bias ? layer.qkv_bias + first : nullptr;
            if (bias)
                for (int i = 0; i < count; i++) store(to + i, sums[i] + bias[i]);
            else
                store_all(to, sums, count);
        });
        const int half = model_.dim / 2;
        team_.share(pass_.tokens, [&](int token) {
            const int64_t turn = pass_.positions[token] * half;
            prepare_token(own_ + token * row, layer.heads, model_.epsilon, model_.cos + turn, model_.sin + turn,
                          pool(number) + pass_.slots[token] * model_.token_stride, heads_);
        });
    }

    // From attention's result to the layer's.
    void end(const Layer &layer) const {
        add(attended_, model_.query_heads * model_.dim, layer.out, layer.out_bias);
        norm(layer.between);
        const int64_t size = 2 * static_cast<int64_t>(model_.inner);
        product(normed_, model_.hidden, layer.gate_up, size, [&](int token, int64_t first, int, const float *sums) {
            const float *bias = layer.gate_up_bias ? layer.gate_up_bias + first : nullptr;
            Element *to = inner_ + static_cast<int64_t>(token) * model_.inner + first / 2;
            if (model_.activation == SILU)
                gate<SILU>(sums, bias, to);
            else if (model_.activation == GELU)
                gate<GELU>(sums, bias, to);
            else
                gate<GELU_TANH>(sums, bias, to);
        });
        add(inner_, model_.inner, layer.down, layer.down_bias);
    }

    void attend(const Layer &layer, int number, const std::vector<Part> &parts) const {
        const Shape shape{model_.token_stride, model_.value_offset, model_.query_heads / model_.key_heads, model_.dim};
        const auto single = attend_for<Element>(model_.dim);
        const int64_t row = heads_.row(), out_row = static_cast<int64_t>(model_.query_heads) * model_.dim;
        team_.share(static_cast<int>(parts.size()), [&](int task) {
            const Part &part = parts[task];
            const int64_t token = pass_.chunk[part.chunk], start = pass_.positions[token];
            const int64_t *first = pass_.first_span[number] + part.chunk, *span = pass_.spans[number] + 2 * first[0];
            const int64_t offset = static_cast<int64_t>(part.head) * shape.group * shape.dim;
            const Element *query = own_ + token * row + offset, *keys = pool(number) + part.head * shape.dim;
            Element *out = attended_ + token * out_row + offset;
            if (part.single) {
                single(query, keys, span, pass_.spans[number] + 2 * first[1], out, part.heads, shape, model_.scale);
                return;
            }
            const int64_t low = layer.window ? std::max<int64_t>(0, start - layer.window + 1) : 0;
            attend_block(query, row, keys, {start, part.first, part.count, span, low, layer.window}, out, out_row, shape,
                         model_.scale);
        });
    }

  private:
    Element *pool(int number) const { return static_cast<Element *>(pass_.pool) + number * model_.layer_stride; }

    void norm(const float *weight) const {
        const int64_t size = model_.hidden;
        team_.share(pass_.tokens, [&](int token) {
            norm_row(hidden_ + token * size, weight, normed_ + token * size, size, model_.epsilon);
        });
    }

    void add(const Element *x, int size, const void *weights, const float *bias) const {
        product(x, size, weights, model_.hidden, [&](int token, int64_t first, int count, const float *sums) {
            Element *to = hidden_ + static_cast<int64_t>(token) * model_.hidden + first;
            const float *own = bias ? bias + first : nullptr;
            for (int i = 0; i < count; i++) store(to + i, static_cast<float>(to[i]) + sums[i] + (own ? own[i] : 0));
        });
    }

    template <typename Finish>
    void product(const Element *x, int size, const void *weights, int64_t outputs, const Finish &finish) const {
        share_product(team_, x, pass_.tokens, size, static_cast<const Element *>(weights), outputs, finish);
    }

    const Model &model_;
    const Pass &pass_;
    Team &team_;
    const Heads heads_;
    Element *const hidden_, *const normed_, *const own_, *const attended_, *const inner_;
};

template <typename Element>
void run_layers(const Model &model, const Layer *layers, const Pass &pass, int first, int end) {
    Team team(omp_get_max_threads());
    const std::vector<Part> parts = parts_of(model, pass, team.size());
#pragma omp parallel num_threads(team.size())
    {
        const Decoder<Element> decoder(model, pass, team);
        for (int number = first; number < end; number++) {
            decoder.begin(layers[number], number);
            decoder.attend(layers[number], number, parts);
            decoder.end(layers[number]);
        }
    }
}

template <typename Element>
void run_product(const Element *x, const Element *weights, const float *bias, float *out, int rows, int size,
                 int outputs) {
    Team team(omp_get_max_threads());
#pragma omp parallel num_threads(team.size())
    share_product(team, x, rows, size, weights, outputs, [&](int row, int64_t first, int count, const float *sums) {
        float *to = out + static_cast<int64_t>(row) * outputs + first;
        for (int i = 0; i < count; i++) to[i] = sums[i] + (bias ? bias[first + i] : 0);
    });
}

}  // namespace
