"""What attention's scores are made of, beside queries and keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastattn.block_mask import Blocks


class ScoreRules(NamedTuple):
    """The options of `fastattn.attention` that ops and launchers pass on, checked, in the order of the ops' arguments.

    Attributes:
        mask: bool, 4 dimensions that broadcast to (B, Hq, Nq, Nk), True = attend; or the blocks of a block mask.
        bias: 4 dimensions that broadcast to (B, Hq, Nq, Nk).
        alibi_slopes: fp32 (B, Hq).
        sinks: (Hq,).
        seed: int64 (1,) of dropout, or None for no dropout.
        scale: the factor of Q Kᵀ.
        window_left: columns that a row sees left of its own place, or None for all.
        window_right: the same to the right; negative where the diagonal itself is out of sight.
        softcap: the bound of the scaled scores, or 0 for none.
        dropout_p: the probability that `seed` is for.
    """

    mask: Tensor | Blocks | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    window_left: int | None
    window_right: int | None
    softcap: float
    dropout_p: float
