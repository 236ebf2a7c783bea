"""What depends on a position alone: rotary position embedding tables, and the scale of queries.

RoPE may be scaled: linear, dynamic, llama3, yarn, longrope.

The formulas and the fp32 angles are those of transformers (modeling_rope_utils.py). Functions of many
positions are evaluated in float64 and then rounded: a vectorised fp32 cosine or power rounds a value by its
place in the tensor and by the number of threads, and a row must depend on its position alone.
"""

import math

import torch
from torch import Tensor

from ..errors import RiverError
from .config import ModelConfig


def rope_tables(
    config: ModelConfig, max_len: int, seq_len: int | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [max_len, rotary_dim / 2]; dims i and i + rotary_dim / 2 of a head rotate together.

    With dynamic scaling and with longrope the frequencies depend on the length of the sequence. By default
    row p has those of a sequence of p + 1 tokens, which is what decoding sees; with seq_len = n every row has
    those of n tokens, which is what the prefill of n tokens sees. Other scalings ignore seq_len.
    """
    positions = torch.arange(max_len, dtype=torch.float32)[:, None]
    lengths = torch.arange(1, max_len + 1)[:, None] if seq_len is None else torch.tensor(seq_len)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "dynamic":
        frequencies = dynamic_frequencies(config, lengths)
    elif scaling["rope_type"] == "longrope":
        frequencies = longrope_frequencies(config, lengths)
    else:
        frequencies = inverse_frequencies(config)
    return _tables(positions * frequencies, device, scaling.get("attention_factor", 1.0))


def unrotated_tables(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin of the same shape that leave queries and keys as they are."""
    return torch.ones_like(tables[0]), torch.zeros_like(tables[1])


def query_scales(
    config: ModelConfig, max_len: int, device: torch.device | str | None = None
) -> Tensor | None:
    """The factor of a query at each position, fp32 [max_len]; None: it is 1 everywhere."""
    if config.query_scaling is None:
        return None
    beta, interval = config.query_scaling
    periods = torch.arange(max_len) // interval
    return (1 + beta * torch.log1p(periods.double())).float().to(device)


def rotary_tables(
    rotary_dim: int, max_len: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The same without scaling, for layers that belong to no checkpoint; rotary_dim is mostly head_dim."""
    if not isinstance(rotary_dim, int) or rotary_dim < 2 or rotary_dim % 2:
        raise RiverError(f"rotary_dim={rotary_dim!r}; accepted: an even integer from 2")
    if not isinstance(max_len, int) or max_len < 1:
        raise RiverError(f"max_len={max_len!r}; accepted: an integer from 1")
    if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise RiverError(f"theta={theta!r}; accepted: a finite number above 0")
    positions = torch.arange(max_len, dtype=torch.float32)[:, None]
    return _tables(positions * _unscaled_frequencies(rotary_dim, theta), device)


def _tables(angles: Tensor, device: torch.device | str | None, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = angles.double()
    return (angles.cos() * factor).float().to(device), (angles.sin() * factor).float().to(device)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[rotary_dim / 2] fp32, where the length of the sequence does not matter."""
    frequencies = _unscaled_frequencies(config.rotary_dim, config.rope_theta)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies, **scaling)
    if scaling["rope_type"] == "yarn":
        return _yarn(frequencies, config)
    return frequencies


def dynamic_frequencies(config: ModelConfig, seq_len: Tensor) -> Tensor:
    """[..., rotary_dim / 2] fp32. NTK-aware: past max_position_embeddings the base grows with seq_len."""
    factor, original, dim = config.rope_scaling["factor"], config.max_position_embeddings, config.rotary_dim
    growth = factor * seq_len.clamp_min(original).double() / original - (factor - 1)
    base = config.rope_theta * growth ** (dim / (dim - 2))
    scaled = 1.0 / (base.float().double() ** _exponents(config.rotary_dim).double()).float()
    return torch.where(seq_len > original, scaled, inverse_frequencies(config))


def longrope_frequencies(config: ModelConfig, seq_len: Tensor) -> Tensor:
    """[..., rotary_dim / 2] fp32: longer sequences than the original ones have factors of their own."""
    scaling = config.rope_scaling
    powers = config.rope_theta ** _exponents(config.rotary_dim)
    short, long = (1.0 / (torch.tensor(scaling[name]) * powers) for name in ("short_factor", "long_factor"))
    return torch.where(seq_len > scaling["original_max_position_embeddings"], long, short)


def _unscaled_frequencies(rotary_dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** _exponents(rotary_dim))


def _exponents(rotary_dim: int) -> Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim


def _llama3(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    rope_type: str = "llama3",
) -> Tensor:
    """Long waves are stretched by factor, short ones stay, those between are interpolated."""
    original = original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    long = wavelength > original / low_freq_factor
    short = wavelength < original / high_freq_factor
    stretched = torch.where(long, frequencies / factor, frequencies)
    smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    return torch.where(~long & ~short, between, stretched)


def _yarn(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Waves that turn often in the original length stay, those that turn seldom are stretched by factor."""
    scaling, dim = config.rope_scaling, config.rotary_dim

    def dim_of(turns: float) -> float:
        """The dim whose wave turns so often in the original length."""
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dim_of(scaling["beta_fast"]), dim_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    stretched = 1.0 / (scaling["factor"] * config.rope_theta ** _exponents(dim))
    return stretched * (1 - kept) + frequencies * kept
