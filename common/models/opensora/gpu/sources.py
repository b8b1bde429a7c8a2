# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, valid-type"
"""What STDiT3 and the autoencoder do between matrix products and convolutions, in Triton: see ``kernels``.

All sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def residual_rows(
    x,
    added,
    gate,
    shift,
    scale,
    total,
    normed,
    size,
    patches,
    tokens,
    batch_stride,
    frame_stride,
    epsilon,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total = x + gate * added, then its layer norm, scaled and shifted; one program for each token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    condition = row // tokens * batch_stride + row % tokens // patches * frame_stride + column
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        more = tl.load(added + row * size + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(gate + condition, mask=inside, other=0.0).to(tl.float32)
        rounded = (values + more).to(total.dtype.element_ty)
        tl.store(total + row * size + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if NORMED:
        centred = tl.where(inside, values - tl.sum(values, 0) / size, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + epsilon)
        scaled = centred * factor * (1.0 + tl.load(scale + condition, mask=inside, other=0.0).to(tl.float32))
        shifted = scaled + tl.load(shift + condition, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + row * size + column, shifted.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def norm_heads(
    qkv,
    query_weight,
    key_weight,
    epsilon,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Root mean square norm of every head of queries and keys, in place; one program for each token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, ROWS_BLOCK)[:, None]
    column = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (head < 2 * HEADS) & (column < DIM)
    own = qkv + token * 3 * HEADS * DIM + head * DIM + column
    values = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 1) / DIM + epsilon)
    of_query = tl.load(query_weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    of_key = tl.load(key_weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    scaled = values * factor[:, None] * tl.where(head < HEADS, of_query, of_key)
    tl.store(own, scaled.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _turned(
    own, weight, cosine, sine, column, inside, epsilon, DIM: tl.constexpr, ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr
):
    """Queries or keys [frames, DIM] of one place and head, normed and turned: neighbours are pairs."""
    values = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 1) / DIM + epsilon)
    values *= tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (ROWS, DIM_BLOCK // 2, 2)))
    swapped = tl.reshape(tl.join(odd, even), (ROWS, DIM_BLOCK))
    return (values * cosine + swapped * sine) * factor[:, None]


@triton.jit
def attend_places(
    qkv,
    query_weight,
    key_weight,
    cos,
    sin,
    out,
    epsilon,
    scale,
    frames,
    patches,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FRAMES_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention over the frames at one place, of one head: norm, rotation, softmax, all of it in registers."""
    head = tl.program_id(0)
    place = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    frame = tl.arange(0, FRAMES_BLOCK)[:, None]
    column = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (frame < frames) & (column < DIM)
    token = (sample * frames + frame) * patches + place
    own = qkv + token * (3 * HEADS * DIM) + head * DIM
    cosine = tl.load(cos + frame * DIM + column, mask=inside, other=0.0)
    sine = tl.load(sin + frame * DIM + column, mask=inside, other=0.0)
    query = _turned(own, query_weight, cosine, sine, column, inside, epsilon, DIM, FRAMES_BLOCK, DIM_BLOCK)
    key = _turned(own + HEADS * DIM, key_weight, cosine, sine, column, inside, epsilon, DIM, FRAMES_BLOCK, DIM_BLOCK)
    values = tl.load(own + 2 * HEADS * DIM + column, mask=inside, other=0.0)
    query, key = query.to(values.dtype), key.to(values.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    other = tl.arange(0, FRAMES_BLOCK)[None, :]
    scores = tl.where(other < frames, scores, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    attended = tl.dot(shares.to(values.dtype), values, input_precision=PRECISION)
    target = out + token * (HEADS * DIM) + head * DIM + column
    tl.store(target, attended.to(out.dtype.element_ty), mask=inside)


@triton.jit
def group_parts(x, means, spreads, size, parts, BLOCK: tl.constexpr):
    """Of one part of one group: its mean, and the sum of squared distances from it."""
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    values = tl.load(x + group * size + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(size - part * BLOCK, BLOCK)
    mean = tl.sum(values, 0) / count
    distance = tl.where(inside, values - mean, 0.0)
    tl.store(means + group * parts + part, mean)
    tl.store(spreads + group * parts + part, tl.sum(distance * distance, 0))


@triton.jit
def group_moments(means, spreads, mean, factor, size, parts, epsilon, BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """Of one group out of its parts (Chan, Golub and LeVeque, 1979): its mean, and one over its deviation."""
    group = tl.program_id(0)
    part = tl.arange(0, PARTS_BLOCK)
    inside = part < parts
    count = tl.where(inside, tl.minimum(size - part * BLOCK, BLOCK), 0).to(tl.float32)
    own = tl.load(means + group * parts + part, mask=inside, other=0.0)
    whole = tl.sum(own * count, 0) / size
    distance = own - whole
    spread = tl.load(spreads + group * parts + part, mask=inside, other=0.0) + count * distance * distance
    tl.store(mean + group, whole)
    tl.store(factor + group, 1.0 / tl.sqrt(tl.sum(tl.where(inside, spread, 0.0), 0) / size + epsilon))


@triton.jit
def group_rows(
    x, weight, bias, mean, factor, out, size, pixels, groups, channels, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    """One part of one group, normed, scaled and shifted channel by channel, and through SiLU."""
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    channel = (group % groups) * channels + place // pixels
    values = tl.load(x + group * size + place, mask=inside, other=0.0).to(tl.float32)
    values = (values - tl.load(mean + group)) * tl.load(factor + group)
    values *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + group * size + place, values.to(out.dtype.element_ty), mask=inside)
