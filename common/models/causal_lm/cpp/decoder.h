// The decoder of Llama and its close relatives: layers of attention and a gated product, over packed weights. A team of
// threads goes through all of it together, so that threads are woken once, not once for each operation.
#pragma once

#include <omp.h>

#include "attention.h"
#include "products.h"
#include "rows.h"
#include "team.h"

// As native.py describes them to ctypes; sizes in elements.
struct Model {
    int hidden, inner, query_heads, key_heads, dim, layers, activation;
    float epsilon, scale;
    int64_t token_stride, layer_stride, value_offset;
    const float *cos, *sin;  // [positions, dim / 2]
};

// Norms and biases are float32; a bias may be null, and so may the norm of heads.
struct Layer {
    const float *before, *between, *heads;
    const void *qkv, *out, *gate_up, *down;
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
};

// What one pass is about. `spans` and `first_span` are each layer's, as attend has them.
struct Pass {
    int tokens;
    const int64_t *positions, *slots;
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

template <int ACTIVATION, typename Element>
void gate(const float *sums, const float *bias, Element *out, int count) {
    constexpr int half = PANEL / 2;
    for (int i = 0; i < count; i++) {
        const float gate = sums[i] + (bias ? bias[i] : 0), up = sums[half + i] + (bias ? bias[half + i] : 0);
        store(out + i, activate<ACTIVATION>(gate) * up);
    }
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
            for (int i = 0; i < count; i++) store(to + i, sums[i] + (bias ? bias[i] : 0));
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
        product(normed_, model_.hidden, layer.gate_up, size, [&](int token, int64_t first, int count, const float *sums) {
            const float *bias = layer.gate_up_bias ? layer.gate_up_bias + first : nullptr;
            Element *to = inner_ + static_cast<int64_t>(token) * model_.inner + first / 2;
            if (model_.activation == SILU)
                gate<SILU>(sums, bias, to, count / 2);
            else if (model_.activation == GELU)
                gate<GELU>(sums, bias, to, count / 2);
            else
                gate<GELU_TANH>(sums, bias, to, count / 2);
        });
        add(inner_, model_.inner, layer.down, layer.down_bias);
    }

    // All tokens are the newest of their sequences, one of each.
    void attend_singles(int number) const {
        const Shape shape{model_.token_stride, model_.value_offset, model_.query_heads / model_.key_heads, model_.dim};
        auto one = model_.dim == 64    ? attend<Element, 64>
                   : model_.dim == 128 ? attend<Element, 128>
                                       : attend<Element, 0>;
        const bool few = pass_.tokens < 4 * team_.size();
        const int parts = !few ? 1 : model_.key_heads % team_.size() ? model_.key_heads : team_.size();
        const int keys = model_.key_heads / parts;
        const int64_t part = static_cast<int64_t>(keys) * shape.group * model_.dim;
        const int64_t *spans = pass_.spans[number], *first = pass_.first_span[number];
        team_.share(pass_.tokens * parts, [&](int task) {
            const int64_t token = task / parts, place = task % parts;
            one(own_ + token * heads_.row() + place * part, pool(number) + place * keys * model_.dim,
                spans + 2 * first[token], spans + 2 * first[token + 1], attended_ + (token * parts + place) * part, keys,
                shape, model_.scale);
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

  public:
    // `finish` is given a row, the first output, how many there are, and their sums.
    template <typename Finish>
    static void share_product(Team &team, const Element *x, int rows, int size, const Element *weights, int64_t outputs,
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

  private:
    const Model &model_;
    const Pass &pass_;
    Team &team_;
    const Heads heads_;
    Element *const hidden_, *const normed_, *const own_, *const attended_, *const inner_;
};

template <typename Element>
void run_layer_begin(const Model &model, const Layer *layers, const Pass &pass, int number) {
    Team team(omp_get_max_threads());
#pragma omp parallel num_threads(team.size())
    Decoder<Element>(model, pass, team).begin(layers[number], number);
}

template <typename Element>
void run_layer_end(const Model &model, const Layer *layers, const Pass &pass, int number) {
    Team team(omp_get_max_threads());
#pragma omp parallel num_threads(team.size())
    Decoder<Element>(model, pass, team).end(layers[number]);
}

template <typename Element>
void run_layers(const Model &model, const Layer *layers, const Pass &pass) {
    Team team(omp_get_max_threads());
#pragma omp parallel num_threads(team.size())
    {
        const Decoder<Element> decoder(model, pass, team);
        for (int number = 0; number < model.layers; number++) {
            decoder.begin(layers[number], number);
            decoder.attend_singles(number);
            decoder.end(layers[number]);
        }
    }
}

template <typename Element>
void run_product(const Element *x, const Element *weights, const float *bias, float *out, int rows, int size,
                 int outputs) {
    Team team(omp_get_max_threads());
#pragma omp parallel num_threads(team.size())
    Decoder<Element>::share_product(
        team, x, rows, size, weights, outputs, [&](int row, int64_t first, int count, const float *sums) {
            float *to = out + static_cast<int64_t>(row) * outputs + first;
            for (int i = 0; i < count; i++) to[i] = sums[i] + (bias ? bias[first + i] : 0);
        });
}

}  // namespace
