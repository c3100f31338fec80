"""What the losses of tokens are computed by, beside their logits and targets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy


class LossRules(NamedTuple):
    """The options of `fastattn.cross_entropy` that ops and launchers pass on, in the order of the ops' arguments.

    Attributes:
        class_weight: (classes,), or None for ones.
        ignore_index: tokens with this target do not count.
        label_smoothing: ε.
        z_loss: λ.
        softcap: the bound of the logits, or 0 for none.
    """

    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
