"""The specification: every op of `ops.py` in a few lines of plain fp32 PyTorch.

Same names and arguments as in `ops.py`. All backends are tested against these functions, every buffer
that an op writes included; so no module of the package is imported here, and none imports this. Values are
rounded to the model dtype at six points only (normalised x, q/k/v after RoPE, attention output, both
residuals, SwiGLU output); everything between is fp32.
"""

import torch
from torch import Tensor

TILE_ROWS, TILE_COLS, TILE_BYTES = 16, 64, 576
SIMILARITY_CHUNK = 16  # one (dot, a, b) triple per 16 output rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim, rounded once."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of fp32 x [T, heads, head_dim] with cos/sin [T, rotary_dim / 2]: dims i and i + rotary_dim / 2."""
    half = cos.shape[-1]
    lo, hi, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin, rest], dim=-1)


def decode_attention(
    query, k_cache, v_cache, slots, positions, *, softmax_scale=None, sliding_window=None, kv_valid=None
):
    heads, head_dim = query.shape[1:]
    group = heads // k_cache.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(query)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot < 0:
            continue
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        seen = torch.arange(first, position + 1, device=query.device)
        if kv_valid is not None:
            seen = seen[kv_valid[slot, seen]]
        if seen.numel() == 0:
            continue
        k = k_cache[slot][:, seen].float().repeat_interleave(group, 0)  # [heads, seen, head_dim]
        v = v_cache[slot][:, seen].float().repeat_interleave(group, 0)
        weights = torch.softmax(torch.einsum("hd,hsd->hs", query[row].float(), k) * scale, dim=-1)
        out[row] = torch.einsum("hs,hsd->hd", weights, v).to(query.dtype)
    return out


def _block(
    hidden, input_layernorm, qkv, o_proj, post_attention_layernorm, gate_up, down_proj, k_cache, v_cache,
    slots, positions, cos, sin, num_attention_heads, eps, q_bias=None, k_bias=None, v_bias=None,
    o_bias=None, q_norm=None, k_norm=None, query_scale=None, softmax_scale=None, sliding_window=None,
    kv_valid=None, residual_multiplier=1.0,
):  # fmt: skip
    """The block shared by both layers. Weights are fp32: qkv and gate_up are tuples, W4 ones dequantised."""
    dtype, rows, head_dim = hidden.dtype, hidden.shape[0], k_cache.shape[-1]
    active = slots >= 0
    at = positions.clamp(0, k_cache.shape[2] - 1).long()
    x = rms_norm(hidden, input_layernorm, eps).float()

    def project(weight, bias, norm):
        y = x @ weight.T + (0 if bias is None else bias.float())
        y = y.view(rows, -1, head_dim)
        if norm is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.float()
        return y

    q = rotate(project(qkv[0], q_bias, q_norm), cos[at], sin[at])
    if query_scale is not None:
        q = q * query_scale[at][:, None, None]
    k = rotate(project(qkv[1], k_bias, k_norm), cos[at], sin[at])
    v = project(qkv[2], v_bias, None)
    for row in active.nonzero().flatten().tolist():
        k_cache[slots[row], :, at[row]] = k[row].to(dtype)
        v_cache[slots[row], :, at[row]] = v[row].to(dtype)
    attended = decode_attention(
        q.to(dtype), k_cache, v_cache, slots, positions,
        softmax_scale=softmax_scale, sliding_window=sliding_window, kv_valid=kv_valid,
    )  # fmt: skip
    o = attended.flatten(1).float() @ o_proj.T + (0 if o_bias is None else o_bias.float())
    middle = (hidden.float() + residual_multiplier * o).to(dtype)
    x = rms_norm(middle, post_attention_layernorm, eps).float()
    swiglu = (torch.nn.functional.silu(x @ gate_up[0].T) * (x @ gate_up[1].T)).to(dtype)
    out = (middle.float() + residual_multiplier * (swiglu.float() @ down_proj.T)).to(dtype)
    out = torch.where(active[:, None], out, hidden)
    return out, state_similarity(hidden, out)


def decoder_block(
    hidden, input_layernorm, q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, gate_proj, up_proj,
    down_proj, k_cache, v_cache, slots, positions, cos, sin, num_attention_heads, rms_norm_eps, **options,
):  # fmt: skip
    return _block(
        hidden, input_layernorm, (q_proj.float(), k_proj.float(), v_proj.float()), o_proj.float(),
        post_attention_layernorm, (gate_proj.float(), up_proj.float()), down_proj.float(),
        k_cache, v_cache, slots, positions, cos, sin, num_attention_heads, rms_norm_eps, **options,
    )  # fmt: skip


def exit_layer(
    hidden, input_layernorm, qkv_proj, o_proj, post_attention_layernorm, gate_up_proj, down_proj, k_cache,
    v_cache, slots, positions, cos, sin, num_attention_heads, rms_norm_eps, **options,
):  # fmt: skip
    heads, kv_heads, head_dim = num_attention_heads, k_cache.shape[1], k_cache.shape[-1]
    hidden_size = hidden.shape[1]
    qkv = split_qkv(qkv_proj, hidden_size, heads, kv_heads, head_dim, 2 * cos.shape[1])
    gate, up = split_gate_up(gate_up_proj, hidden_size)
    return _block(
        hidden, input_layernorm, qkv, dequantize_w4(o_proj, hidden_size, heads * head_dim, torch.float32),
        post_attention_layernorm, (gate, up), dequantize_w4(down_proj, hidden_size, len(gate), torch.float32),
        k_cache, v_cache, slots, positions, cos, sin, num_attention_heads, rms_norm_eps, **options,
    )  # fmt: skip


def split_qkv(qkv_proj, hidden_size, heads, kv_heads, head_dim, rotary_dim):
    """Q, K and V, fp32 and in natural order, of a packed qkv_proj: the rotary pairs of Q, those of K, then V.

    Every part is padded to whole tiles.
    """
    dense = dequantize_w4(qkv_proj, len(qkv_proj) * TILE_ROWS, hidden_size, torch.float32)
    q, k = (rotary_rows(count, head_dim, rotary_dim) for count in (heads, kv_heads))
    v = torch.arange(kv_heads * head_dim)
    k_start = _whole_tiles(heads * head_dim)
    v_start = k_start + _whole_tiles(kv_heads * head_dim)
    return tuple(dense[rows.to(dense.device)] for rows in (q, k_start + k, v_start + v))


def split_gate_up(gate_up_proj, hidden_size):
    """gate and up, fp32, of a packed gate_up_proj: a tile has 8 rows of each; padding comes last."""
    dense = dequantize_w4(gate_up_proj, len(gate_up_proj) * TILE_ROWS, hidden_size, torch.float32)
    gate = paired_rows(torch.arange(len(gate_up_proj) * TILE_ROWS // 2)).to(dense.device)
    return dense[gate], dense[gate + TILE_ROWS // 2]


def rotary_rows(heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Where the rows of Q or K lie in packed form, in natural order.

    A head has head_dim / 2 pairs: dims i and i + rotary_dim / 2, which rotate together, and then two by two
    the dims that pass through.
    """
    head, dim = torch.arange(heads * head_dim) // head_dim, torch.arange(heads * head_dim) % head_dim
    half, passing = rotary_dim // 2, dim - rotary_dim
    pair = torch.where(passing < 0, dim % half, half + passing // 2)
    is_second = torch.where(passing < 0, dim >= half, passing % 2 == 1)
    return paired_rows(head * (head_dim // 2) + pair) + TILE_ROWS // 2 * is_second


def paired_rows(pair: Tensor) -> Tensor:
    """The packed row of the first of each pair; the second lies 8 below. A tile has the rows of 8 pairs."""
    return pair // 8 * TILE_ROWS + pair % 8


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def dual_layer(
    index, hidden, previous, thresholds, min_layers, limit, exited, similarities,
    input_layernorm, q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, gate_proj, up_proj, down_proj,
    qkv_tiles, o_tiles, gate_up_tiles, down_tiles, k_cache, v_cache, slots, positions, cos, sin,
    num_attention_heads, rms_norm_eps, *, together=False, **options,
):  # fmt: skip
    active = slots >= 0
    left = exited[index - 1] == 1 if index > 0 else torch.zeros_like(active)
    agrees = left | (index >= limit)
    if index > 0:
        similarity = state_similarity(previous, hidden)
        similarities[index - 1, active & ~left] = similarity[active & ~left]
        agrees |= (similarity > thresholds) & (index >= min_layers)
    if together and not agrees[active].all():
        agrees = left
    exits = active & agrees
    exited[index] = exits
    block = (q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, gate_proj, up_proj, down_proj)
    twin = (qkv_tiles, o_tiles, post_attention_layernorm, gate_up_tiles, down_tiles)
    rest = (positions, cos, sin, num_attention_heads, rms_norm_eps)
    out = hidden
    for _ in range(2):  # after the first time, the K and V of all rows are there to attend to
        for layer, weights, rows in (decoder_block, block, active & ~exits), (exit_layer, twin, exits):
            own = torch.where(rows, slots, -1)
            y, _ = layer(hidden, input_layernorm, *weights, k_cache, v_cache, own, *rest, **options)
            out = torch.where(rows[:, None], y, out)
    return out


def advance(
    before, after, tokens, embed_tokens, stop_tokens, hidden, slots, positions, draw_positions, remaining,
    exited, similarities, step, records,
):  # fmt: skip
    rows, number = len(tokens), step.item()
    active = slots >= 0
    measured = active & (exited[-1] == 0)
    similarities[-1, measured] = state_similarity(before, after)[measured]
    record = records[number % len(records)]
    record[1 : 1 + rows] = (exited.cumsum(0) == 0).sum(0)
    drawn = (tokens >= 0) & (tokens < len(embed_tokens))
    record[1 + rows : 1 + 2 * rows] = torch.where(active, torch.where(drawn, tokens, -2), -1)
    record[1 + 2 * rows :] = similarities.flatten().view(torch.int32)
    known = active & drawn
    hidden[known] = embed_tokens[tokens[known]]
    positions += active
    draw_positions[active] = positions[active] + 1
    remaining -= active.int()
    stops = (tokens[:, None] == stop_tokens).any(1)
    slots[active & ((remaining <= 0) | ~drawn | stops)] = -1
    exited.zero_()
    step += 1
    record[0] = number + 1  # last of all: the host polls it


def draft_advance(
    tokens, margins, index, wanted, sure, embed_tokens, drafts, hidden, slots, positions, draw_positions,
    verify_hidden, verify_slots,
):  # fmt: skip
    drafting = slots >= 0
    counts = drafting & (index < wanted) & (tokens >= 0) & (tokens < len(embed_tokens))
    draft = tokens[counts]
    row = slice((index + 1) * len(tokens), (index + 2) * len(tokens))
    drafts[index + 1, counts] = draft
    verify_slots[row][counts] = slots[counts]
    verify_hidden[row][counts] = hidden[counts] = embed_tokens[draft]
    positions += counts
    draw_positions += counts
    slots[drafting & ~(counts & (index + 1 < wanted) & (margins >= sure))] = -1


def accept(
    tokens, drafts, embed_tokens, stop_tokens, remaining, hidden, slots, positions, draw_positions,
    verify_hidden, verify_slots, verify_positions, verify_draw_positions, step, records,
):  # fmt: skip
    (max_tokens, requests), number = drafts.shape, step.item()
    record = records[number % len(records)]
    record[1:] = -1
    for r in range(requests):
        if verify_slots[r] < 0:
            continue
        rows = slice(r, None, requests)
        found = zip(tokens[rows].tolist(), drafts[:, r].tolist(), verify_slots[rows].tolist(), strict=False)
        new, ends = _new_tokens(found, stop_tokens[r].tolist(), remaining[r].item(), len(embed_tokens))
        record[1 + r] = len(new)
        record[1 + requests :][rows][: len(new)] = torch.tensor(new)
        if new[-1] >= 0:
            hidden[r] = verify_hidden[r] = embed_tokens[new[-1]]
        verify_positions[rows] = verify_positions[r] + len(new) + torch.arange(max_tokens)
        verify_draw_positions[rows] = verify_positions[rows] + 1
        positions[r], draw_positions[r] = verify_positions[r], verify_draw_positions[r]
        remaining[r] -= len(new)
        slots[r] = -1 if ends else verify_slots[r]
        verify_slots[r] = slots[r]
    verify_slots[requests:] = -1
    drafts.fill_(-1)
    step += 1
    record[0] = number + 1  # last of all: the host polls it


def _new_tokens(rows, stop_tokens, remaining, vocab_size) -> tuple[list[int], bool]:
    """The new tokens of a request, from its (target, draft, slot) row by row; and whether they end it."""
    new = []
    for target, draft, slot in rows:
        if slot < 0 or (new and draft != new[-1]):
            break
        drawn = 0 <= target < vocab_size
        new.append(target if drawn else -2)
        if not drawn or target in stop_tokens or len(new) >= remaining:
            return new, True
    return new, False


def state_similarity(x: Tensor, y: Tensor) -> Tensor:
    x, y = _prescaled(x), _prescaled(y)
    dot, a, b = (_ordered_sum(p) for p in (x * y, x * x, y * y))
    cosine = (dot / (a.sqrt() * b.sqrt())).clamp(-1, 1)
    return torch.where(torch.isfinite(cosine), cosine, 0.0)


def _prescaled(x: Tensor) -> Tensor:
    """fp32 rows, times 2^-e where the largest magnitude, in [2^e, 2^(e+1)), lies outside [2^-40, 2^40]."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1
    outside = torch.isfinite(largest) & (largest > 0) & ((largest < 2.0**-40) | (largest > 2.0**40))
    return torch.where(outside, torch.ldexp(x.double(), -exponent).float(), x)


def _ordered_sum(products: Tensor) -> Tensor:
    partials = products.unflatten(-1, (-1, SIMILARITY_CHUNK)).sum(-1)
    total = torch.zeros_like(partials[..., 0])
    for partial in partials.unbind(-1):
        total = total + partial
    return total


def lm_head(
    hidden, norm, weight, rms_norm_eps, *, return_logits=True, temperature=None, seeds=None, positions=None,
    logits_scaling=1.0,
):  # fmt: skip
    logits = rms_norm(hidden, norm, rms_norm_eps).float() @ weight.float().T / logits_scaling
    keys = logits
    if temperature is not None:
        noise = torch.stack([
            gumbel(seed, position, torch.arange(weight.shape[0]))
            for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)
        ])  # fmt: skip
        sampled = keys / temperature.clamp_min(1e-30)[:, None] + noise.to(keys.device)
        keys = torch.where(temperature[:, None] > 0, sampled, keys)
    # torch.argmax does not promise the lowest index among ties
    best = keys.amax(-1, keepdim=True)
    ids = torch.arange(keys.shape[1], device=keys.device)
    tokens = torch.where(keys == best, ids, keys.shape[1]).amin(-1)
    second = torch.where(ids == tokens[:, None], -torch.inf, keys).amax(-1)
    finite = logits.isfinite().all(-1)
    margins = torch.where(finite & (best[:, 0] != second), best[:, 0] - second, 0.0)
    return torch.where(finite, tokens, -1), logits if return_logits else logits[:0], margins


def lm_head_w4(hidden, norm, weight, vocab_size, rms_norm_eps, **options):
    dense = dequantize_w4(weight, vocab_size, hidden.shape[1], torch.float32)
    return lm_head(hidden, norm, dense, rms_norm_eps, **options)


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    options = (option.tolist() for option in (top_k, seeds, positions))
    drawn = [
        _draw(*row)
        for row in zip(logits.cpu(), *(t.cpu() for t in (temperature, top_p, min_p)), *options, strict=True)
    ]
    tokens, logprobs = zip(*drawn, strict=True)
    return torch.tensor(tokens, device=logits.device), torch.stack(logprobs).to(logits.device)


def _draw(logits, temperature, top_p, min_p, top_k, seed, position):
    """A token of logits [vocab_size] and its log-probability, by sorting."""
    if not logits.isfinite().all():
        return -1, torch.tensor(float("nan"))
    kept = logits.sort(descending=True, stable=True).indices  # ranked, ties by id
    largest, token = logits[kept[0]], kept[0]
    if temperature > 0:
        temperature = temperature.clamp_min(1e-30)
        scaled = (logits - largest) / temperature
        kept = kept[: top_k or None]
        if top_p < 1:
            weights = weights_of(scaled[kept])
            limit = max(1, int(top_p * 2**32)) * int(weights.sum())  # in units of 2^-32 of a weight
            kept = kept[weights.cumsum(0) - weights < -(-limit >> 32)]
        if min_p > 0:
            kept = kept[scaled[kept] >= (_log(min_p) if min_p < 1 else 0)]
        scores = logits[kept] / temperature + gumbel(seed, position, kept)
        token = kept[scores == scores.max()].min()
    total = weights_of(logits - largest).sum()
    return int(token), (logits[token] - largest) - _log(total.float() * 2.0**-WEIGHT_BITS) + 0.0  # never -0


WEIGHT_BITS = 40
# e^r ~ 1 + r + r^2 * polynomial, highest power first (Cephes, expf)
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def weights_of(scaled: Tensor) -> Tensor:
    """e^x of fp32 x <= 0 in units of 2^-40, rounded down, as int64: sums of them are exact in any order.

    e^x itself is a fixed sequence of sums and products of IEEE fp32, rounded once each.
    """
    x = scaled.clamp_min(-32)  # its weight is 0
    n = (x * 1.44269504 + 12582912.0) - 12582912.0  # rounds to an integer
    r = (x - n * LOG_2[0]) - n * LOG_2[1]
    p = torch.full_like(r, EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = p * r
        p = p + coefficient
    p = ((p * r) * r + r) + 1
    return torch.ldexp(p.double(), n.double() + WEIGHT_BITS).floor().long()


def _log(x: Tensor) -> Tensor:
    return _log_of(*_reduced(x))


def philox(seed: int, counter: tuple[Tensor, int, int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four uint32 words, as int64, per entry of counter[0]."""
    mask = 0xFFFFFFFF
    key = [seed & mask, (seed >> 32) & mask]
    c = [counter[0]] + [torch.full_like(counter[0], int(word) & mask) for word in counter[1:]]
    for _ in range(10):
        # 32 x 32 -> 64-bit products from 16-bit halves, as int64 is signed
        (hi0, lo0), (hi1, lo1) = _mulhilo(0xD2511F53, c[0]), _mulhilo(0xCD9E8D57, c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Gumbel noise of token ids [n] in one draw: a function of (seed, position, token id) only.

    Token id v takes word v % 4 of Philox counter (v / 4, position, 0, 0).
    """
    words = torch.stack(philox(seed, (tokens // 4, position, 0, 0)), -1)
    return gumbel_of(words.gather(-1, tokens[:, None] % 4).flatten())


def gumbel_of(words: Tensor) -> Tensor:
    """-log(-log(1 - v)) for v = (word + 1/2) / 2^32 of int64 words, from -3.13 to 22.87.

    Every sum and product is one of IEEE fp32, rounded once, so that all backends give these very bits. v has
    the precision where it counts: large noise comes from small v, where 1 - v would round to 1.
    """
    v, rest_of_v = ((w.float() + 0.5) * 2.0**-32 for w in (words, 0xFFFFFFFF - words))
    rest, exponent = _reduced(rest_of_v)
    return -_log_of(*_reduced(-_log_of(torch.where(exponent == 0, -v, rest), exponent)))


SQRT_HALF = 0x3F3504F3  # as fp32
# log(1 + f) ~ f - f^2 / 2 + f^3 * polynomial, highest power first (Cephes, logf)
LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LOG_2 = 0.693359375, -2.12194440e-4  # the first has few bits, so that its multiples are exact


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """(f, e) in fp32 with x = (1 + f) * 2^e and 1 + f from sqrt(1/2) to sqrt(2)."""
    shifted = x.view(torch.int32) - SQRT_HALF
    return ((shifted & 0x7FFFFF) + SQRT_HALF).view(torch.float32) - 1, (shifted >> 23).float()


def _log_of(f: Tensor, e: Tensor) -> Tensor:
    square = f * f
    p = torch.full_like(f, LOG_POLYNOMIAL[0])
    for coefficient in LOG_POLYNOMIAL[1:]:
        p = p * f
        p = p + coefficient
    p = p * f * square
    p = p + e * LOG_2[1]
    p = p - 0.5 * square
    return f + p + e * LOG_2[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (x.float() @ weight.float().T + (0 if bias is None else bias.float())).to(x.dtype)


def linear_w4(x: Tensor, weight: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    dense = dequantize_w4(weight, out_features, x.shape[1], torch.float32)
    return linear(x, dense, bias)


def _nibble_places() -> tuple[Tensor, Tensor]:
    """For tile entry (row, column): index of its 32-bit word among 128, and its shift (layout: w4.py)."""
    row = torch.arange(TILE_ROWS)[:, None].expand(TILE_ROWS, TILE_COLS)
    column = torch.arange(TILE_COLS)[None].expand(TILE_ROWS, TILE_COLS)
    word = (row % 8) * 16 + column // 4
    shift = 16 * (column % 2) + 4 * ((column % 4) // 2) + 8 * (row // 8)
    return word, shift


def pack_w4(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    out_features, in_features = q.shape
    n, k = -(-out_features // TILE_ROWS), -(-in_features // TILE_COLS)
    group_tiles = -(-k // scale.shape[1])
    padded = torch.zeros(n * TILE_ROWS, k * TILE_COLS, dtype=torch.int64, device=q.device)
    padded[:out_features, :in_features] = q
    tiles = padded.view(n, TILE_ROWS, k, TILE_COLS).transpose(1, 2)  # [n, k, 16, 64]
    word, shift = (p.to(q.device) for p in _nibble_places())
    words = torch.zeros(n, k, 128, dtype=torch.int64, device=q.device)
    words.scatter_add_(2, word.reshape(1, 1, -1).expand(n, k, -1), (tiles << shift).flatten(2))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    metadata = torch.zeros(n * TILE_ROWS, k, 2, dtype=torch.float16, device=q.device)
    metadata[:out_features, :, 0] = scale.repeat_interleave(group_tiles, 1)[:, :k]
    metadata[:out_features, :, 1] = zero.repeat_interleave(group_tiles, 1)[:, :k]
    metadata = metadata.view(n, TILE_ROWS, k, 2).transpose(1, 2).contiguous()
    return torch.cat([words.view(torch.uint8), metadata.flatten(2).view(torch.uint8)], dim=2)


def unpack_w4(packed: Tensor, out_features: int, in_features: int, group_size: int = 64):
    n, k, _ = packed.shape
    words = packed[..., :512].contiguous().view(torch.int32).long()
    word, shift = (p.to(packed.device) for p in _nibble_places())
    tiles = (words[:, :, word] >> shift) & 15  # [n, k, 16, 64]
    q = tiles.transpose(1, 2).reshape(n * TILE_ROWS, k * TILE_COLS)[:out_features, :in_features]
    metadata = packed[..., 512:].contiguous().view(torch.float16).view(n, k, TILE_ROWS, 2)
    metadata = metadata.transpose(1, 2).reshape(n * TILE_ROWS, k, 2)[
        :out_features, :: group_size // TILE_COLS
    ]
    return q.to(torch.uint8).contiguous(), metadata[..., 0].contiguous(), metadata[..., 1].contiguous()


def dequantize_w4(packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    q, scale, zero = unpack_w4(packed, out_features, in_features)
    scale, zero = (m.float().repeat_interleave(TILE_COLS, 1)[:, :in_features] for m in (scale, zero))
    return ((q.float() - zero) * scale).to(dtype)
