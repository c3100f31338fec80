"""Plants bugs in the package, one at a time, and shows that the tests catch each: `python -m tests.mutants`.

A mutant is a source text substitution in a temporary copy of the repository. It is caught when a test fails; the table
shows the first line of that failure. The command ends with exit status 1 if a mutant survives, if the text that it
replaces is no longer there exactly once, or if the tests do not pass without any bug.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("fastattn", "tests", "bench", "pyproject.toml")

FORWARD, BACKWARD = "kernels/attention.py", "kernels/attention_backward*.py"
ATTENTION = ("tests/test_attention.py", "-k", "triton")
BUDGETS = ("tests/test_budgets.py", "-k")
BLOCK_MASK = ("tests/test_block_mask.py", "-k", "triton")
DECODE = ("tests/test_decode.py", "-k", "triton")
EAGER_ATTENTION = ("tests/test_attention.py", "-k", "eager")
NORM = ("tests/test_precision.py", "tests/test_normalization.py", "-k", "triton")
SHORT_DECODE = ("tests/test_decode.py", "-k", "short_way")
PRODUCTS = ("tests/test_attention_products.py",)
CPU_PRODUCTS = ("tests/test_cpu_products.py",)
ORDER = ("tests/test_order.py",)
MAPS = ("tests/test_attention_maps.py",)
MASK_BLOCKS = ("tests/test_mask_blocks.py",)
EAGER_FEED_FORWARD = ("tests/test_feed_forward.py", "-k", "eager or on_the_cpu")
EAGER_LOSS = ("tests/test_loss.py", "-k", "eager")
EAGER_NORM = ("tests/test_normalization.py", "-k", "eager")
ROTARY = ("tests/test_rotary.py", "-k", "triton or kernel")
LOSS = ("tests/test_loss.py", "-k", "triton")
FEED_FORWARD = ("tests/test_precision.py", "tests/test_feed_forward.py", "-k", "triton")
TRANSFORMER = ("tests/test_nn_transformer.py",)
HUB = ("tests/test_hub.py",)
PATCHING = ("tests/test_patching.py", "tests/test_patching_comparison.py")
TRANSFORMERS = ("tests/test_transformers_attention.py",)
TRANSFORMS = ("tests/test_transforms.py",)
LEFT_TO_COMPILER = ("tests/test_left_to_compiler.py",)


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in the files that match `where`; `tests` are the pytest arguments that must catch `new`."""

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant("accumulator is not rescaled", FORWARD, "acc * rescale[:, None]", "acc", ATTENTION),
    Mutant(
        "a bias of float32's lowest number in base 2",
        FORWARD,
        "tl.where(tl.abs(m_new) < BASE_2, LOG2E, 0.5)",
        "tl.where(tl.abs(m_new) < BASE_2, LOG2E, LOG2E)",
        ("tests/test_attention_arguments.py", "-k", "blocks_of_keys"),
    ),
    Mutant(
        "rows behind the last are not read as the last",
        FORWARD,
        "tl.minimum(offs_m, num_queries - 1)",
        "offs_m",
        ATTENTION,
    ),
    Mutant("denominator is not rescaled", FORWARD, "l = l * rescale + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", ATTENTION),
    Mutant(
        "ALiBi's slope is not in the unit of plain scores",
        "kernels/masks.py",
        "slope * (LOG2E / scale) if PLAIN else slope",
        "slope",
        ATTENTION,
    ),
    Mutant(
        "a sink is not in the unit of the running maximum",
        FORWARD,
        ".to(tl.float32) / unit",
        ".to(tl.float32)",
        ATTENTION,
    ),
    Mutant(
        "with a bias the backward's log-sum-exp is in base 2",
        BACKWARD,
        "    if bias_ptr is None:\n        minus_lse *= LOG2E\n",
        "    minus_lse *= LOG2E\n",
        ATTENTION,
    ),
    Mutant(
        "later tiles of a mixed block have the bits of its first",
        FORWARD,
        "mixed_tile(lists, kind) + bits + start % BLOCK",
        "mixed_tile(lists, kind) + bits",
        BLOCK_MASK,
    ),
    Mutant(
        "the last heads are mixed as if there were more",
        "kernels/order.py",
        "tl.minimum(together, rows - first)",
        "together",
        ORDER,
    ),
    Mutant(
        "16-bit scores are capped twice as late",
        "kernels/masks.py",
        "(2.0 * LOG2E / softcap)",
        "(LOG2E / softcap)",
        ATTENTION,
    ),
    Mutant("the shortest first", "kernels/order.py", "(blocks - 1 - place) * BLOCK_M", "place * BLOCK_M", ORDER),
    Mutant(
        "a block with a hole counts as full",
        "kernels/mask_blocks.py",
        "count == BLOCK * BLOCK",
        "count > BLOCK",
        MASK_BLOCKS,
    ),
    Mutant(
        "mixed blocks over the full ones", "kernels/mask_blocks.py", "next_mixed = full", "next_mixed = 0", MASK_BLOCKS
    ),
    Mutant(
        "a dense mask's window stands at the top left",
        "kernels/mask_blocks.py",
        "num_keys - num_queries, left",
        "0, left",
        MASK_BLOCKS,
    ),
    Mutant(
        "a dense mask's last column is dropped",
        "block_mask.py",
        "b * size) for",
        "(b - 1) * size) for",
        MASK_BLOCKS,
    ),
    Mutant(
        "a dense mask's rows begin one block late",
        "eager/row_block.py",
        "self.hulls[rows.start // BLOCK :",
        "self.hulls[rows.start // BLOCK + 1 :",
        MASK_BLOCKS,
    ),
    Mutant("wrong key head under GQA", FORWARD, "(head // group).to(tl.int64)", "(head % 2).to(tl.int64)", ATTENTION),
    Mutant("no guard for rows that see nothing", FORWARD, "tl.where(l == 0, 1.0, l)", "l", ATTENTION),
    Mutant(
        "causal edge is one too far",
        "kernels/masks.py",
        "y <= tl.minimum(x + (shift + ahead), other_length - 1)",
        "y <= tl.minimum(x + (shift + ahead) + 1, other_length - 1)",
        ATTENTION,
    ),
    Mutant(
        "last visible block is skipped",
        "kernels/masks.py",
        "high = tl.minimum(tl.maximum(last + shift + ahead + 1, 0), other_length)",
        "high = tl.minimum(tl.maximum(last + shift + ahead, 0), other_length)",
        ATTENTION,
    ),
    Mutant(
        "bottom-right offset is one off",
        FORWARD,
        "shift = num_keys - num_queries",
        "shift = num_keys - num_queries - 1",
        ATTENTION,
    ),
    Mutant(
        "tail reads one key too many",
        FORWARD,
        "offs_n < num_keys - start, batch",
        "offs_n <= num_keys - start, batch",
        ATTENTION,
    ),
    Mutant(
        "offset of the head in 32 bits",
        FORWARD,
        "b, h, kv_h = batch.to(tl.int64), head.to(tl.int64)",
        "b, h, kv_h = batch, head",
        ("tests/test_large_offsets.py",),
    ),
    Mutant("scale dropped in dQ", BACKWARD, "dq, scale, rows", "dq, 1.0, rows", ATTENTION),
    Mutant(
        "a chunk of a wide head left out of the scores",
        "kernels/chunks.py",
        "tl.trans(b[index])",
        "tl.trans(b[0])",
        ATTENTION,
    ),
    Mutant(
        "the limit on registers never reaches the compiler",
        "kernels/launch.py",
        'constexprs["maxnreg"] = max_registers',
        "pass",
        ("tests/test_tiles.py", "-k", "limit_on_registers"),
    ),
    Mutant("delta dropped", "kernels/recompute.py", "dp += minus_delta", "dp += 0.0", ATTENTION),
    Mutant("dK's scores begin with 0", BACKWARD, "k, q, minus_lse if PLAIN else None", "k, q, None", ATTENTION),
    Mutant(
        "statistics in the wrong unit", BACKWARD, "minus_lse / score_scale if PLAIN", "minus_lse if PLAIN", ATTENTION
    ),
    Mutant(
        "gradient of the LSE has the wrong sign",
        BACKWARD,
        "minus_delta += tl.load(",
        "minus_delta -= tl.load(",
        ATTENTION,
    ),
    Mutant(
        "dK and dV of packed sequences end where unpacked ones would",
        BACKWARD,
        "n += first_k",
        "n += 0",
        ("tests/test_varlen.py", "-k", "triton"),
    ),
    Mutant(
        "derivative of the softcap",
        "kernels/masks.py",
        "return 1.0 - ratio * ratio",
        "return 1.0 + ratio * ratio",
        ATTENTION,
    ),
    Mutant(
        "dropout keeps the wrong share",
        "kernels/random.py",
        "kept = half >= threshold",
        "kept = half < threshold",
        ("tests/test_random.py",),
    ),
    Mutant(
        "dropout: a tile of 16 columns counts them from 0",
        "kernels/random.py",
        "first_column + tl.arange(0, COLUMNS)",
        "tl.arange(0, COLUMNS)",
        ("tests/test_random.py",),
    ),
    Mutant(
        "dropout: rows that lie 8 apart share their choice",
        "kernels/random.py",
        "tl.where(row_part == 0, w1, w3)",
        "w1",
        ("tests/test_random.py",),
    ),
    Mutant(
        "dropout: neighbours in a row share a word",
        "kernels/random.py",
        "word = (columns & 3) + zero",
        "word = (columns & 2) + zero",
        ("tests/test_random.py",),
    ),
    Mutant("dropout: six rounds", "kernels/random.py", "tl.constexpr(7)", "tl.constexpr(6)", ("tests/test_random.py",)),
    Mutant(
        "eager: dropout's rows that lie 8 apart share their choice",
        "eager/random.py",
        "torch.where(upper, w1, w3)",
        "w1",
        ("tests/test_random.py",),
    ),
    Mutant(
        "eager: far keys under ALiBi are dropped whatever their scores",
        "eager/attention_fused.py",
        "-2.0 * abs(block.rules.scale) * float(q * k) - 40.0",
        "-40.0",
        ("tests/test_attention.py", "-k", "far_keys"),
    ),
    Mutant(
        "eager: window is one too wide",
        "eager/row_block.py",
        "before = j < i - self.rules.window_left",
        "before = j < i - self.rules.window_left - 1",
        EAGER_ATTENTION,
    ),
    Mutant(
        "statistics in the dtype of the input",
        "kernels/norm*.py",
        "mean = input.new_empty(rows if centered else 0, dtype=torch.float32)",
        "mean = input.new_empty(rows if centered else 0)",
        NORM,
    ),
    Mutant(
        "partial sums of the weight gradient in the dtype of the input",
        "kernels/norm*.py",
        "hidden.new_empty(2, groups * programs, columns, dtype=torch.float32)",
        "hidden.new_empty(2, groups * programs, columns)",
        NORM,
    ),
    Mutant(
        "last row of partial sums dropped",
        "kernels/norm*.py",
        "mask = (row < programs)[:, None] & mask_n[None, :]",
        "mask = (row < programs - 1)[:, None] & mask_n[None, :]",
        NORM,
    ),
    Mutant(
        "padding counts as part of the row",
        "kernels/norm*.py",
        "h = tl.where(mask, h - mean[:, None], 0.0)",
        "h = h - mean[:, None]",
        NORM,
    ),
    Mutant(
        "layer norm's gradient misses the mean",
        "kernels/norm*.py",
        "dh -= (tl.sum(g, 1) / columns)[:, None]",
        "dh -= 0.0",
        NORM,
    ),
    Mutant(
        "sum of exponentials is not rescaled",
        "kernels/loss.py",
        "l = l * tl.exp2(base_2(m) - reference) +",
        "l = l +",
        LOSS,
    ),
    Mutant("z-loss has no gradient", "kernels/loss.py", "a + 2.0 * z_loss * lse", "a", LOSS),
    Mutant(
        "a new token is written one too early",
        "ops/decode.py",
        "keys[:, :, length:].copy_",
        "keys[:, :, length - 1 : end - 1].copy_",
        SHORT_DECODE,
    ),
    Mutant(
        "delta has the scale of dS",
        "eager/attention_products.py",
        "    do *= scale\n",
        "    do[..., :dim] *= scale\n",
        PRODUCTS,
    ),
    Mutant(
        "a row of bf16 on its own forgets the mask",
        "eager/attention_fused.py",
        "attn_mask=twice",
        "attn_mask=None",
        CPU_PRODUCTS,
    ),
    Mutant(
        "the backward in fp32 for bf16 forgets the mask",
        "eager/attention_fused.py",
        "mask = None if additive is None else additive.float()",
        "mask = None",
        CPU_PRODUCTS,
    ),
    Mutant(
        "fp16 in fp32 forgets the bias",
        "eager/attention.py",
        "forward(query.float(), key.float(), value.float(), rules, precision",
        "forward(query.float(), key.float(), value.float(), rules._replace(bias=None), precision",
        CPU_PRODUCTS,
    ),
    Mutant(
        "oneDNN's product forgets the bias",
        "eager/products.py",
        "onednn_linear(x, weight, bias)",
        "onednn_linear(x, weight, None)",
        CPU_PRODUCTS,
    ),
    Mutant(
        "oneDNN reads a bias whatever its strides",
        "eager/products.py",
        "None if bias is None else bias.contiguous()",
        "bias",
        CPU_PRODUCTS,
    ),
    Mutant(
        "a compiler's graph holds an op where tangents pass",
        "ops/library.py",
        "        return in_transform()\n",
        "        return False\n",
        TRANSFORMS,
    ),
    Mutant(
        "a batch of gradients is taken as one",
        "ops/library.py",
        "if in_batch() else gradients_of",
        "if False else gradients_of",
        TRANSFORMS,
    ),
    Mutant(
        "a lost tangent is not noticed",
        "ops/library.py",
        "if has_tangent(*arguments) and not",
        "if False and not",
        TRANSFORMS,
    ),
    Mutant(
        "in fp16 a sum over rows is taken for their mean",
        "ops/linear_loss.py",
        "grad_weight.mul_(unit * mean)",
        "grad_weight.mul_(unit)",
        EAGER_LOSS,
    ),
    Mutant(
        "the bias's gradient forgets the unit of the token weights",
        "ops/linear_loss.py",
        "        grad_bias.mul_(unit)\n",
        "",
        EAGER_LOSS,
    ),
    Mutant(
        "an ignored token of the least numbers",
        "kernels/loss.py",
        'tl.where(valid, lse, float("inf"))',
        "lse",
        LOSS,
    ),
    Mutant(
        "a weight's gradient lies in another order than the weight",
        "eager/products.py",
        "onednn_linear(x.t(), dy.t(), None).t().contiguous()",
        "onednn_linear(x.t(), dy.t(), None).t()",
        CPU_PRODUCTS,
    ),
    Mutant(
        "weights are copied whatever they take",
        "eager/products.py",
        "if sum(w.numel() * dtype.itemsize for w, dtype in zip(weights, dtypes)) > MOST_PACKED:",
        "if False:",
        CPU_PRODUCTS,
    ),
    Mutant(
        "statistics of packed sequences lie over each other",
        "kernels/recompute.py",
        "(first_q // STATISTICS + index) * STATISTICS",
        "(first_q // STATISTICS) * STATISTICS",
        ("tests/test_varlen.py", "-k", "one_long_sequence"),
    ),
    Mutant(
        "the gate's product is lost in fp32",
        "eager/products.py",
        "in_fp32(product_with_columns, dy, weight, dg, gate)",
        "in_fp32(product_with_columns, dy, weight)",
        CPU_PRODUCTS,
    ),
    Mutant(
        "a CPU without 16-bit instructions multiplies in 16 bits",
        "eager/products.py",
        "return lacking or not onednn_takes(dtype)",
        "return False and lacking",
        ("tests/test_cpu_products.py", "-k", "which_cpus"),
    ),
    Mutant(
        "autocast goes on inside of an op",
        "checks.py",
        "if autocasts(device) else nullcontext():",
        "if not autocasts(device) else nullcontext():",
        ("tests/test_autocast.py",),
    ),
    Mutant(
        "RMS norm writes over an fp32 residual stream",
        "eager/normalization.py",
        "else x if copied else None)",
        "else x)",
        EAGER_NORM,
    ),
    Mutant("maps: a softmax's gradient forgets a sink", "eager/attention_maps.py", "dp * (p / l)", "dp * p", MAPS),
    Mutant("maps: a sink's gradient has the wrong sign", "eager/attention_maps.py", "dsinks += ", "dsinks -= ", MAPS),
    Mutant(
        "maps: the rows' places are off", "eager/attention_maps.py", "yield slice(start, end)", "yield slice(end)", MAPS
    ),
    Mutant("hidden keys count", "eager/attention_products.py", ".mul_(visible[..., :seen])", "", PRODUCTS),
    Mutant("future keys count", "eager/attention_products.py", ".tril_(block.start)", ".tril_()", PRODUCTS),
    Mutant(
        "GELU's tanh form has the slope of the exact one",
        "eager/activations.py",
        'partial(aten.gelu_backward, approximate="tanh")',
        "aten.gelu_backward",
        EAGER_FEED_FORWARD,
    ),
    Mutant(
        "GELU's tanh form is the exact one",
        "eager/activations.py",
        '"gelu", [], "tanh"',
        '"gelu", [], "none"',
        EAGER_FEED_FORWARD,
    ),
    Mutant("log of a probability of 0", "eager/loss.py", "_PROBABILITY = 1e-25", "_PROBABILITY = -1.0", EAGER_LOSS),
    Mutant(
        "input gradients of the last rows come first",
        "eager/loss.py",
        "rows in gradient.split",
        "rows in gradient.flip(0).split",
        EAGER_LOSS,
    ),
    Mutant("z-loss of half the log-sum-exp", "eager/loss.py", "- p.amax(1).log_()", "+ p.amax(1).log_()", EAGER_LOSS),
    Mutant("blocks of dW are added twice", "eager/loss.py", "part.view(-1)\n", "part.view(-1) * 2\n", EAGER_LOSS),
    Mutant(
        "a compiled norm's result lies as its input does",
        "ops/normalization.py",
        ".to(hidden_dtype).contiguous()",
        ".to(hidden_dtype)",
        LEFT_TO_COMPILER,
    ),
    Mutant(
        "exported programs lose their norms",
        "tracing.py",
        " and not torch.compiler.is_exporting()",
        "",
        LEFT_TO_COMPILER,
    ),
    Mutant(
        "a model shared by FSDP is saved without its processes' parts",
        "models/sharded.py",
        "tensor.full_tensor() if",
        "tensor.to_local() if",
        ("tests/test_distributed.py", "-k", "saved_whole"),
    ),
    Mutant(
        "RMS norm's gradient keeps layer norm's term of the mean",
        "eager/normalization.py",
        "dh += (torch.mv(dy, gain)",
        "dh += 0.0 * (torch.mv(dy, gain)",
        EAGER_NORM,
    ),
    Mutant(
        "RMS norm over the sum of squares",
        "eager/normalization.py",
        "norm.square_().div_(columns)",
        "norm.square_()",
        EAGER_NORM,
    ),
    Mutant(
        "RMS norm adds a sum where the mean belongs",
        "eager/normalization.py",
        "(rstd / len(gain))",
        "rstd",
        EAGER_NORM,
    ),
    Mutant(
        "ragged end of a row reads the next row",
        "kernels/loss.py",
        'z = tl.where(inside, z, -float("inf"))',
        'z = tl.where(column >= 0, z, -float("inf"))',
        LOSS,
    ),
    Mutant(
        "stored gradients are scaled although they are asked for again",
        "ops/linear_loss.py",
        "torch._C._autograd._get_current_graph_task_keep_graph()",
        "False",
        ("tests/test_loss.py",),
    ),
    Mutant(
        "outputs are views", "ops/library.py", "output.detach() if output._is_view() else", "", ("tests/test_nn.py",)
    ),
    Mutant("kernels read negatives", "ops/library.py", "_INTERPRETING or not first.is_cpu", "False", ROTARY),
    Mutant("rotary's gradient turns forward", "kernels/rotary.py", "sin = -sin", "sin = sin", ROTARY),
    Mutant("rotary: rows outside the table are read", "kernels/rotary.py", "& (offs_n < rows)", "", ROTARY),
    Mutant(
        "rotary saves what in-place rotation overwrites",
        "ops/rotary.py",
        "drop_arguments=(0, 1)",
        "drop_arguments=()",
        ("tests/test_rotary.py",),
    ),
    Mutant(
        "a block mask's lists end one block early",
        "kernels/masks.py",
        "end * BLOCK, (",
        "end * BLOCK - BLOCK, (",
        BLOCK_MASK,
    ),
    Mutant(
        "mixed blocks are read transposed",
        "kernels/attention.py",
        "bits = (offs_m - lists[2])[:, None] * BLOCK + offs_n[None, :]",
        "bits = (offs_m - lists[2])[:, None] + offs_n[None, :] * BLOCK",
        BLOCK_MASK,
    ),
    Mutant(
        "dBias takes mixed blocks for full ones",
        "kernels/attention_backward_bias.py",
        "mask=(kind >= 0) & rows",
        "mask=(kind >= 9) & rows",
        BLOCK_MASK,
    ),
    Mutant(
        "blocks are full where they only see something",
        "block_mask.py",
        "mixed = some & ~every",
        "every = some; mixed = some & ~every",
        ("tests/test_block_mask.py", "-k", "dense_mask"),
    ),
    Mutant(
        "unused pages are looked at",
        "ops/decode.py",
        "read = first_rows < ends",
        "read = first_rows <= ends + 8",
        ("tests/test_decode_edges.py",),
    ),
    Mutant(
        "a tangent is lost",
        "ops/decode.py",
        "if not (recorded or dual):",
        "if not recorded:",
        ("tests/test_decode_edges.py",),
    ),
    Mutant(
        "a window inside a graph crosses one block of a row",
        "block_mask.py",
        '(starts + right).div(BLOCK, rounding_mode="floor") + step for step in (0, 1)',
        '(starts + right).div(BLOCK, rounding_mode="floor") + step for step in (0, 0)',
        ("tests/test_block_mask.py", "-k", "graph"),
    ),
    Mutant(
        "a head over many is not shared",
        "ops/leading_dims.py",
        "if x.dim() == 2 or x.shape[-3] in (1, heads):",
        "if x.dim() == 2 or x.shape[-3] in (1, heads, 2):",
        ("tests/test_sdpa.py",),
    ),
    Mutant(
        "rows in front of the first key are read",
        "kernels/decode.py",
        "places = first_place + start",
        "places = start",
        DECODE,
    ),
    Mutant("rows in front of the first key count", "kernels/decode.py", "num_keys - first_place", "num_keys", DECODE),
    Mutant("splits are merged without their weights", "kernels/decode.py", "part * weight[:, None]", "part", DECODE),
    Mutant(
        "every split has the sink",
        "kernels/decode.py",
        "mask=in_rows & (split == 0), other",
        "mask=in_rows, other",
        DECODE,
    ),
    Mutant(
        "new keys overwrite the last one",
        "kernels/decode.py",
        "position += tl.load(lengths_ptr + batch).to(tl.int32)",
        "position += tl.load(lengths_ptr + batch).to(tl.int32) - 1",
        DECODE,
    ),
    Mutant(
        "a token is read without its position",
        "models/decoding.py",
        "self.position_embedding[position]",
        "self.position_embedding[0]",
        ("tests/test_gpt.py",),
    ),
    Mutant(
        "a token sees one more than its window",
        "models/decoding.py",
        "max(0, position - block.behind)",
        "max(0, position - block.behind - 1)",
        ("tests/test_gpt.py", "-k", "reading_one_token"),
    ),
    Mutant(
        "eager: the bias of hidden pairs counts where it is no number",
        "eager/attention_fused.py",
        "block.rules.bias is not None and lse.isnan().any()",
        "False",
        ("tests/test_attention_arguments.py", "-k", "causal_bias"),
    ),
    Mutant(
        "eager: a causal row of padding alone is one that sees",
        "eager/attention_fused.py",
        "        blind = blind | (first_shown",
        "        blind = blind & (first_shown",
        ("tests/test_attention_arguments.py", "-k", "causal_bias"),
    ),
    Mutant(
        "a replicated bias's gradient is one process's part",
        "ops/distributed.py",
        "[Partial() if p == Replicate() and axis is not None else p for axis, p in zip(axes, placements)]",
        "placements",
        ("tests/test_distributed.py",),
    ),
    Mutant(
        "derivative of SiLU",
        "kernels/activations.py",
        "value, derivative = z * s, s + z * slope\n",
        "value, derivative = z * s, s + slope\n",
        FEED_FORWARD,
    ),
    Mutant(
        "derivative of the tanh form of GELU",
        "kernels/activations.py",
        "(1.0 + 0.134145 * z * z)",
        "(1.0 + 0.044715 * z * z)",
        FEED_FORWARD,
    ),
    Mutant(
        "ragged depth of a product reads past the row",
        "kernels/feed_forward.py",
        "mask=mask_a & (offs_k < depth - start)[None, :]",
        "mask=mask_a & (offs_k <= depth - start)[None, :]",
        FEED_FORWARD,
    ),
    Mutant(
        "bias gradient accumulates in bf16",
        "ops/feed_forward.py",
        "db = dz.sum(0)",
        "db = sum(dz, torch.zeros_like(dz.sum(0)))",
        FEED_FORWARD,
    ),
    Mutant(
        "weight gradient accumulates in bf16",
        "eager/products.py",
        "return torch.mm(dy.t(), x)",
        "return sum((torch.outer(a, b) for a, b in zip(dy, x)), torch.zeros_like(torch.mm(dy.t(), x)))",
        FEED_FORWARD,
    ),
    Mutant(
        "a fused layer skips the hooks of its children",
        "nn/plain.py",
        "_is_conv1d(m)) and is_unhooked(m) and",
        "_is_conv1d(m)) and",
        TRANSFORMER,
    ),
    Mutant(
        "torch computes around our attention",
        "nn/transformer.py",
        "child._qkv_same_embed_dim = False",
        "pass",
        TRANSFORMER,
    ),
    Mutant(
        "patch: what only looks known is swapped",
        "comparing.py",
        "if error := error_of(",
        "if error := 0.0 and error_of(",
        PATCHING,
    ),
    Mutant("patch: a clamp is not seen", "adapters.py", "(1.0, 1e-4, 1e3)", "(1.0, 1e-4, 1.0)", PATCHING),
    Mutant(
        "patch: parameters are compared as they are", "comparing.py", "part._parameters.update(drawn)", "pass", PATCHING
    ),
    Mutant("patch: TF32 stays", "comparing.py", 'matmul.fp32_precision = "ieee"', "pass", PATCHING),
    Mutant("patch: heads of any length are swapped", "patching.py", "(widest := max(", "(widest := 0 * max(", PATCHING),
    Mutant(
        "unpickling registers nothing",
        "integrations/transformers.py",
        "register()  # whoever",
        "pass  # whoever",
        PATCHING,
    ),
    Mutant(
        "patch: dropout in training is not seen",
        "comparing.py",
        "(False,) if redrawn else (False, True)",
        "(False,)",
        PATCHING,
    ),
    Mutant(
        "rotary: tables of inference mode",
        "nn/rotary.py",
        "torch.inference_mode(False)",
        "torch.no_grad()",
        ("tests/test_rotary.py",),
    ),
    Mutant(
        "patch: a softcap that shows in large logits alone is not seen",
        "causal_loss.py",
        "_LARGE / float(",
        "1.0 + 0.0 * float(",
        ("tests/test_causal_loss.py",),
    ),
    Mutant(
        "patch: logits that somebody asks for are missing",
        "causal_loss.py",
        "isinstance(keep, Tensor) or keep != 0",
        "False",
        ("tests/test_causal_loss.py",),
    ),
    Mutant("unpatch: attributes stay", "patching.py", "vars(module).update(attributes)", "pass", PATCHING),
    Mutant(
        "patch: torch's stack makes nested tensors",
        "patching.py",
        'if swapped_inside and vars(module).get("use_nested_tensor"):',
        "if False:",
        PATCHING,
    ),
    Mutant(
        "patch: Gemma's weights taken for Llama's",
        "adapters.py",
        "weight_offset = 1.0",
        "weight_offset = 0.0",
        PATCHING,
    ),
    Mutant(
        "hub: the scaling of rotary positions is dropped",
        "models/hub.py",
        'None if rule == "default" else rope',
        "None",
        HUB,
    ),
    Mutant("hub: GPT-2's weights stay transposed", "models/hub.py", '".c_fc.weight")', ")", HUB),
    Mutant(
        "GPT: positions start anew behind the cache",
        "models/layers.py",
        "offset = 0 if cache is None or positions is not None else cache.length",
        "offset = 0",
        HUB,
    ),
    Mutant(
        "transformers: the empty places of a static cache are attended to",
        "integrations/transformers.py",
        "right = query.shape[2] - key.shape[2]",
        "right = 0",
        TRANSFORMERS,
    ),
    Mutant(
        "transformers: softcap is swallowed", "integrations/transformers.py", "softcap or None", "None", TRANSFORMERS
    ),
    Mutant(
        "transformers: sinks are swallowed", "integrations/transformers.py", "None, s_aux,", "None, None,", TRANSFORMERS
    ),
    Mutant(
        "transformers: a mask without its function",
        "integrations/transformers.py",
        "AttentionMaskInterface.register(NAME, attention_mask)",
        "None",
        TRANSFORMERS,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """`verdict` is "caught", "SURVIVED", or what is wrong with the mutant itself."""

    mutant: Mutant
    verdict: str
    evidence: str = ""


def run_tests(copy: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Run pytest in `copy`, stopping at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def try_mutant(mutant: Mutant, copy: Path) -> Outcome:
    """Apply `mutant` to `copy`, run its tests, and undo it."""
    files = [path for path in (copy / "fastattn").glob(mutant.where) if mutant.old in path.read_text()]
    if len(files) != 1 or files[0].read_text().count(mutant.old) != 1:
        return Outcome(mutant, f"the text stands in {len(files)} files, or more than once in one")
    path = files[0]
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        result = run_tests(copy, mutant.tests)
    finally:
        path.write_text(source)
    if result.returncode == 0:
        return Outcome(mutant, "SURVIVED")
    if result.returncode != 1:  # not a failing test, but pytest itself: nothing collected, import error
        return Outcome(mutant, f"pytest ended with {result.returncode}", result.stdout.strip().splitlines()[-1])
    failure = re.search(r"^E\s+(.*)", result.stdout, re.MULTILINE)
    return Outcome(mutant, "caught", failure[1] if failure else "")


def chosen_mutants(pattern: str) -> list[Mutant]:
    chosen = [mutant for mutant in MUTANTS if pattern in f"{mutant.where} {mutant.name}"]
    if not chosen:
        raise SystemExit(f"no mutant has {pattern!r} in its name or place")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only mutants with this text in their name or place")
    mutants = chosen_mutants(parser.parse_args().pattern)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in COPIED:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            result = run_tests(copy, tests)
            if result.returncode != 0:
                print(f"without any bug, pytest {' '.join(tests)} fails:\n{result.stdout[-3000:]}")
                return 1
        outcomes = []
        for mutant in mutants:
            outcome = try_mutant(mutant, copy)
            outcomes.append(outcome)
            print(f"{outcome.verdict:9} {mutant.name} ({mutant.where}): {outcome.evidence[:90]}", flush=True)
    caught = sum(outcome.verdict == "caught" for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} planted bugs caught")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
