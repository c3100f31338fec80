"""What every op means, written naively and independently of the package.

The functions compute in the dtype of their inputs: with float64 inputs they are the truth, and with the dtype under test
they are the plain PyTorch whose error sets the tolerance.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def philox(counter: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The four words of Philox-4x32-7 (Salmon et al., 2011), uint64 arrays; the key is the seed's low and high word."""
    low = np.uint64(0xFFFFFFFF)
    c, k = list(counter), [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(7):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def philox_keep(seed: int, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """Dropout's choice for (batch, head, row, column): in a block of 16 x 32, rows r, r + 8 and columns c, c + 8, c + 16, c + 24
    take the eight halves of Philox's four words, low halves first."""
    b, h, i, j = np.indices(shape)
    counter = [j // 32 * 8 + j % 8, i // 16 * 8 + i % 8, h, b]
    halves = [
        half
        for word in philox([c.astype(np.uint64) for c in counter], seed)
        for half in (word % np.uint64(2**16), word // np.uint64(2**16))
    ]
    half = np.choose(i // 8 % 2 * 4 + j // 8 % 4, halves)
    return torch.from_numpy(half >= np.uint64(round(p * 2**16)))


def philox_keep_rows(seed: int, rows: int, columns: int, p: float) -> Tensor:
    """Dropout's choice for (row, column) of a tensor of rows: a word of Philox on (column // 4, row, 0, 0)."""
    i, j = (x.astype(np.uint64) for x in np.indices((rows, columns)))
    word = np.choose(
        (j % np.uint64(4)).astype(np.int64), philox([j // np.uint64(4), i, i * np.uint64(0), i * np.uint64(0)], seed)
    )
    return torch.from_numpy(word >= np.uint64(round(p * 2**16) << 16))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) with the whole N × N matrix in sight."""
    heads, n, dim = query.shape[1:]
    nk = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    gap = torch.arange(n)[:, None] + (nk - n) - torch.arange(nk)  # how far the key lies before the query
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * gap.abs()
    visible = torch.ones(n, nk, dtype=torch.bool)
    if causal:
        visible &= gap >= 0
    if window is not None and window[0] is not None:
        visible &= gap <= window[0]
    if window is not None and window[1] is not None:
        visible &= gap >= -window[1]
    visible = visible.expand(scores.shape)
    if mask is not None:
        visible = visible & mask
    dead = ~visible.any(-1)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(dead[..., None], 0.0)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        dead = torch.zeros_like(dead)
        scores = torch.cat([scores.masked_fill(~visible, -torch.inf), sink], dim=-1)
    lse = torch.logsumexp(scores, -1).masked_fill(dead, -torch.inf)
    weights = torch.softmax(scores, -1)[..., :nk].masked_fill(dead[..., None], 0.0)
    if dropout_factors is not None:
        weights = weights * dropout_factors.to(weights.dtype)
    return weights @ value, lse


def normalise(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    dims: int = 1,
    eps: float = 1e-5,
    centered: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """Layer norm, or RMS norm if not centered: (y,), or (y, input + residual)."""
    over = tuple(range(-dims, 0))
    hidden = input if residual is None else input + residual
    y = hidden - hidden.mean(over, keepdim=True) if centered else hidden
    y = y / torch.sqrt((y * y).mean(over, keepdim=True) + eps)
    y = y if weight is None else y * (weight + weight_offset)
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return (y,) if residual is None else (y, hidden)


def activation(z: Tensor, name: str) -> Tensor:
    """From the definitions, not from torch.nn.functional."""
    root = math.sqrt(2 / math.pi)
    return {
        "identity": lambda: z,
        "relu": lambda: z * (z > 0),
        "relu2": lambda: z * z * (z > 0),
        "gelu": lambda: z * torch.special.ndtr(z),
        "gelu_tanh": lambda: z * (1 + torch.tanh(root * (z + 0.044715 * z**3))) / 2,
        "silu": lambda: z / (1 + torch.exp(-z)),
        "sigmoid": lambda: 1 / (1 + torch.exp(-z)),
        "tanh": lambda: torch.tanh(z),
    }[name]()


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    act: str = "gelu",
) -> Tensor:
    z = linear(input, weight1, bias1)
    hidden = activation(z, act) if gate_weight is None else activation(linear(input, gate_weight, gate_bias), act) * z
    return linear(hidden, weight2, bias2)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (input[..., None, :] * weight).sum(-1)
    return y if bias is None else y + bias


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    classes = logits.shape[-1]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, -1)
    valid = target != ignore_index
    is_target = (torch.where(valid, target, 0)[..., None] == torch.arange(classes)).to(logits.dtype)
    weight = torch.ones(classes) if class_weight is None else class_weight
    weight = weight.to(logits.dtype)
    wanted = (1 - label_smoothing) * is_target + label_smoothing / classes
    losses = (wanted * weight * (lse[..., None] - logits)).sum(-1) + z_loss * lse**2
    losses = losses * valid
    total = ((is_target * weight).sum(-1) * valid).sum()
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / total}[reduction]


def linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options: object
) -> Tensor:
    return cross_entropy(linear(input, weight, bias), target, **options)


def rotary(
    query: Tensor,
    key: Tensor,
    *,
    inverse_frequencies: Tensor,
    positions: Tensor,
    interleaved: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """By complex numbers, one head and token at a time; positions (B, N)."""
    angles = positions[:, None, :, None] * inverse_frequencies
    turn = torch.polar(torch.full_like(angles, factor), angles)
    half = inverse_frequencies.numel()

    def rotate(x: Tensor) -> Tensor:
        head, rest = x[..., : 2 * half], x[..., 2 * half :]
        pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
        z = torch.complex(pairs[..., 0].float().to(angles.dtype), pairs[..., 1].float().to(angles.dtype)) * turn
        y = torch.stack([z.real, z.imag], -1 if interleaved else -2).flatten(-2).to(x.dtype)
        return torch.cat([y, rest], -1)

    return rotate(query), rotate(key)
