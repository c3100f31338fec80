"""The angles of rotary position embedding: how fast each pair of numbers turns, and tables of cosines and sines.

The rules and the names of their parameters are those of the `rope_parameters` (`rope_scaling`) of Hugging Face's model
configurations. With R the rotary dimension and λ_j = 2π / ω_j, a pair's wavelength in tokens:

    default   ω_j = base^(-2j / R)                                            Su et al., 2021, https://arxiv.org/abs/2104.09864
    linear    ω_j / factor                                                    Chen et al., 2023, https://arxiv.org/abs/2306.15595
    dynamic   base · (factor · length / original - factor + 1)^(R / (R - 2)) as the base, once length > original (NTK-aware)
    yarn      ω_j / factor for long wavelengths, ω_j for short ones, a linear ramp between, and tables times 0.1 ln(factor) + 1:
              Peng et al., 2023, https://arxiv.org/abs/2309.00071
    llama3    ω_j / factor for λ_j > original / low_freq_factor, ω_j for λ_j < original / high_freq_factor, a ramp between
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.checks import check_integer, check_number


def rotary_frequencies(
    rotary_dim: int, *, base: float = 10_000.0, scaling: Mapping[str, Any] | None = None, length: int = 0
) -> tuple[Tensor, float]:
    """(ω, factor of the tables): radians per token of each pair, float64 (rotary_dim / 2,) on the CPU.

    Args:
        rotary_dim: how many numbers of a head are rotated: even, at least 2.
        base: ω runs from 1 down to almost 1 / base. ("rope_theta" in `scaling` comes before it.)
        scaling: {"rope_type": "default", "linear", "dynamic", "yarn" or "llama3", ...} with that rule's parameters.
        length: how many tokens the tables are for; "dynamic" alone depends on it.

    Raises:
        TypeError: a dimension or length that is no integer.
        ValueError: a dimension, rule or parameter that is unknown, missing or out of range.

    Example:
        >>> rotary_frequencies(4)[0]
        tensor([1.0000, 0.0100], dtype=torch.float64)
    """
    rotary_dim, length = check_integer("rotary_dim", rotary_dim), check_integer("length", length)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    options = dict(scaling or {})
    rule, base = options.pop("rope_type", options.pop("type", "default")), options.pop("rope_theta", base)
    check_number("base", base)
    if not base > 1.0:
        raise ValueError(f"base must be more than 1, got {base}")
    if rule not in RULES:
        raise ValueError(f"scaling's rope_type must be one of {', '.join(RULES)}, got {rule!r}")
    parameters = list(inspect.signature(RULES[rule]).parameters.values())[3:]
    allowed = [p.name for p in parameters]
    required = [p.name for p in parameters if p.default is p.empty]
    if not set(required) <= set(options) <= set(allowed):
        raise ValueError(
            f"scaling of type {rule!r} takes {', '.join(allowed) or 'nothing'} (needed: {', '.join(required) or 'nothing'}), "
            f"got {', '.join(options) or 'nothing'}"
        )
    if not options.get("factor", 1.0) >= 1.0:
        raise ValueError(f"scaling's factor must be at least 1, got {options['factor']}")
    return RULES[rule](rotary_dim, base, length, **options)


def rotary_tables(
    rotary_dim: int,
    length: int,
    *,
    base: float = 10_000.0,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions 0 to length - 1, fp32 (length, rotary_dim / 2), for `fastattn.rotary`.

    Arguments and errors are those of `rotary_frequencies`; without `device`, they are on PyTorch's default one. The angles
    are computed in float64: in fp32, position 100,000 is off by up to 0.004 radians.

    Example:
        >>> cos, sin = rotary_tables(64, 1024, base=500_000.0, scaling={"rope_type": "linear", "factor": 4.0})
        >>> cos.shape
        torch.Size([1024, 32])
    """
    length = check_integer("length", length)
    frequencies, factor = rotary_frequencies(rotary_dim, base=base, scaling=scaling, length=length)
    device = torch.empty(0).device if device is None else device
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    cos, sin = ((factor * table).to(torch.float32).to(device) for table in (angles.cos(), angles.sin()))
    return cos, sin


def _default(rotary_dim: int, base: float, length: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    return base**-exponents, 1.0


def _linear(rotary_dim: int, base: float, length: int, factor: float) -> tuple[Tensor, float]:
    return _default(rotary_dim, base, length)[0] / factor, 1.0


def _dynamic(
    rotary_dim: int, base: float, length: int, factor: float, original_max_position_embeddings: int
) -> tuple[Tensor, float]:
    if rotary_dim == 2:
        raise ValueError("rotary_dim must be at least 4 for scaling of type 'dynamic', got 2")
    stretch = factor * max(length / original_max_position_embeddings, 1.0) - (factor - 1.0)
    return _default(rotary_dim, base * stretch ** (rotary_dim / (rotary_dim - 2)), length)


def _yarn(
    rotary_dim: int,
    base: float,
    length: int,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    def pair_of(turns: float) -> float:
        """Which pair turns so often over the original length."""
        return (
            rotary_dim * math.log(original_max_position_embeddings / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))
        )

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu")
    interpolated = ((pairs - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)  # what share of a pair is
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    frequencies, _ = _default(rotary_dim, base, length)
    frequencies = frequencies * (1.0 - interpolated + interpolated / factor)
    return frequencies, magnitude() if attention_factor is None else attention_factor


def _llama3(
    rotary_dim: int,
    base: float,
    length: int,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> tuple[Tensor, float]:
    frequencies, _ = _default(rotary_dim, base, length)
    turns = original_max_position_embeddings * frequencies / (2.0 * math.pi)  # over the original length
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor), 1.0


RULES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
