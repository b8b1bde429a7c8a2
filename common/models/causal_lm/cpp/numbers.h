// The types of numbers of weights, keys and values; all sums are float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

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

}  // namespace
