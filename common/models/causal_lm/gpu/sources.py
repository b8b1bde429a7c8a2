# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, valid-type"
"""What a decoder layer does between its matrix products, in Triton: see ``kernels``, which calls it.

Attention of one new token of each of many sequences reads keys and values in place, block by block. It is split along
the sequence, so that a few sequences fill the card too, and joined by log-sum-exp (flash decoding, Dao et al., 2023).
All sums are float32.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def norm_rows(x, weight, out, size, epsilon, BLOCK: tl.constexpr):
    """Root mean square norm; one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + epsilon)
    scaled = values * factor * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * size + column, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def prepare_heads(
    heads,
    weight,
    epsilon,
    cos,
    sin,
    slots,
    pool,
    token_stride,
    value_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Norm and turn queries and keys; queries stay in place, keys and values go to the pool.

    One program for each token and each SHARE of its heads. A token with a slot below 0 is padding.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * SHARE + tl.arange(0, SHARE)[:, None]
    place = tl.arange(0, HALF_BLOCK)[None, :]
    half: tl.constexpr = DIM // 2
    inside = (head < HEADS + 2 * KV_HEADS) & (place < half)
    turned = head < HEADS + KV_HEADS
    own = heads + token * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM + place
    low = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(own + half, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(low * low + high * high, 1)[:, None]
        factor = tl.where(turned, 1.0 / tl.sqrt(squares / DIM + epsilon), 1.0)
        weights = weight + head * DIM + place
        low *= factor * tl.load(weights, mask=inside & turned, other=1.0)
        high *= factor * tl.load(weights + half, mask=inside & turned, other=1.0)
    cosine = tl.where(turned, tl.load(cos + token * half + place, mask=place < half, other=1.0), 1.0)
    sine = tl.where(turned, tl.load(sin + token * half + place, mask=place < half, other=0.0), 0.0)
    first = (low * cosine - high * sine).to(heads.dtype.element_ty)
    second = (high * cosine + low * sine).to(heads.dtype.element_ty)
    query = inside & (head < HEADS)
    tl.store(own, first, mask=query)
    tl.store(own + half, second, mask=query)
    slot = tl.load(slots + token).to(tl.int64)
    kept = inside & (head >= HEADS) & (slot >= 0)
    target = pool + slot * token_stride + tl.where(turned, 0, value_offset)
    target += (head - HEADS - tl.where(turned, 0, KV_HEADS)) * DIM + place
    tl.store(target, first, mask=kept)
    tl.store(target + half, second, mask=kept)


@triton.jit
def gate_rows(gate_up, out, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """activation(gate) * up, of rows of gates followed by as many ups."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # The hyperbolic tangent's approximation of the same: (1 + tanh(x)) / 2 is the sigmoid of 2x.
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * size + column, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend_part(
    query,
    pool,
    positions,
    tables,
    out,
    weights,
    scale,
    window,
    softcap,
    query_stride,
    table_stride,
    token_stride,
    value_offset,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The heads of one group, of one sequence, over one part of what they see.

    A position below 0 is padding and gives zeros. With SPLITS of 1 `out` is the result, else the parts of it,
    [sequences, heads, SPLITS, DIM] float32, and `weights` their log-sum-exps to the base of 2.
    """
    kv_head, sequence, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads = tl.num_programs(0) * GROUP
    member = tl.arange(0, GROUP_BLOCK)
    column = tl.arange(0, DIM_BLOCK)
    asking = (member < GROUP)[:, None] & (column < DIM)[None, :]
    head = kv_head * GROUP + member
    asked = tl.load(query + sequence * query_stride + head[:, None] * DIM + column[None, :], mask=asking, other=0.0)
    length = tl.load(positions + sequence).to(tl.int32) + 1
    lowest = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first_tile = lowest // TILE
    tiles = tl.cdiv(length, TILE) - first_tile
    share = tl.cdiv(tiles, SPLITS)
    begin = first_tile + split * share
    end = tl.minimum(begin + share, first_tile + tiles)

    highest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    gathered = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for tile in range(begin, end):
        place = tile * TILE + tl.arange(0, TILE)
        there = place < length
        block = tl.load(tables + sequence * table_stride + place // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
        slot = block * BLOCK_TOKENS + place % BLOCK_TOKENS
        own = pool + slot[:, None] * token_stride + kv_head * DIM + column[None, :]
        present = there[:, None] & (column < DIM)[None, :]
        keys = tl.load(own, mask=present, other=0.0)
        scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scale
        if SOFTCAPPED:
            # tanh(x) is 2 sigmoid(2x) - 1.
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where((there & (place >= lowest))[None, :], scores * _LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        shares = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(shares, 1)
        values = tl.load(own + value_offset, mask=present, other=0.0)
        gathered *= shrink[:, None]
        gathered += tl.dot(shares.to(values.dtype), values, input_precision=PRECISION)
        highest = higher

    # Nothing was seen: zeros, of no weight.
    gathered = gathered / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (sequence * heads + head) * SPLITS + split
    target = out + row[:, None] * DIM + column[None, :]
    tl.store(target, gathered.to(out.dtype.element_ty), mask=asking)
    if SPLITS > 1:
        tl.store(weights + row, highest + tl.log2(total), mask=member < GROUP)


@triton.jit
def join_parts(
    parts,
    weights,
    out,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """One head of one sequence out of its parts."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, DIM_BLOCK)
    weight = tl.load(weights + row * SPLITS + split)
    highest = tl.max(weight, 0)
    share = tl.exp2(weight - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share, 0)
    places = (row * SPLITS + split)[:, None] * DIM + column[None, :]
    part = tl.load(parts + places, mask=(column < DIM)[None, :], other=0.0)
    joined = tl.sum(part * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DIM + column, joined.to(out.dtype.element_ty), mask=column < DIM)
