"""Which class of scores a call belongs to, and that the class decides its tiles."""

from collections import defaultdict

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from fastattn.kernels import attention_config
from fastattn.kernels import launch as launching
from fastattn.kernels.attention_config import (
    AttentionConfig,
    attention_backward_key_config,
    attention_backward_query_config,
    attention_forward_config,
)
from fastattn.kernels.config import matmul_config, norm_backward_config
from fastattn.kernels.launch import Target
from fastattn.kernels.tiles import score_class
from fastattn.score_rules import ScoreRules

ROWS, KEYS = 32, 48
MASK, BIAS, SLOPES = torch.ones(1, 1, ROWS, KEYS, dtype=torch.bool), torch.zeros(1, 2, ROWS, KEYS), torch.ones(2)
SEED = torch.zeros(1, dtype=torch.int64)
# rows that start at no multiple of 16 numbers, columns that are not neighbours, a first number off the grid
ODD_ROWS = torch.zeros(1, 2, ROWS, KEYS + 1)[..., :KEYS]
COLUMNS_APART = torch.zeros(1, 2, KEYS, ROWS).mT
SHIFTED = torch.zeros(1, 2, ROWS, KEYS + 16)[..., 1 : KEYS + 1]


def scores_of(mask=None, bias=None, alibi=None, seed=None, scale=0.1, softcap=0.0, left=None):
    return score_class(ScoreRules(mask, bias, alibi, None, seed, scale, left, None, softcap, 0.0))[1]


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, "plain"),
        ({"left": 8}, "plain"),
        ({"alibi": SLOPES, "left": 8}, "alibi"),
        ({"softcap": 30.0}, "capped"),
        ({"alibi": SLOPES, "softcap": 30.0, "left": 8}, "capped"),
        ({"scale": -0.1}, "capped"),
        ({"mask": MASK}, "loaded"),
        ({"mask": MASK[..., :1, :]}, "loaded"),
        ({"mask": MASK[..., :1]}, "loaded"),
        ({"bias": BIAS}, "loaded"),
        ({"mask": MASK, "left": 8}, "heavy"),
        ({"bias": ODD_ROWS}, "heavy"),
        ({"bias": COLUMNS_APART}, "heavy"),
        ({"bias": SHIFTED}, "heavy"),
        ({"mask": MASK, "bias": BIAS}, "heavy"),
        ({"mask": MASK, "alibi": SLOPES}, "heavy"),
        ({"bias": BIAS, "softcap": 30.0}, "heavy"),
        ({"seed": SEED}, "dropped"),
        ({"seed": SEED, "left": 8}, "dropped"),
        ({"seed": SEED, "mask": MASK}, "heavy"),
        ({"seed": SEED, "alibi": SLOPES}, "heavy"),
    ],
)
def test_class_of_scores(options, scores):
    assert scores_of(**options) == scores


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_light_scores_take_larger_tiles_than_heavy_ones(arch):
    def size(choose, scores, head_dim):
        config = choose(Target("cuda", arch, 100), head_dim, 2, scores)
        return config.block_m * config.block_n

    for choose in (attention_forward_config, attention_backward_query_config):
        for scores in ("plain", "alibi", "capped", "loaded", "dropped"):
            assert size(choose, scores, 128) > size(choose, "heavy", 128)
    for scores in ("loaded", "dropped"):
        assert size(attention_backward_key_config, scores, 128) > size(attention_backward_key_config, "heavy", 128)


@pytest.mark.parametrize(("arch", "like"), [(103, 100), (86, 120), (89, 120), (121, 120)])
def test_gpus_that_take_the_tiles_of_others(arch, like):
    """B300 those of B200; all with little shared memory the same."""
    target, other = (Target("cuda", number, 100) for number in (arch, like))
    for choose in (attention_forward_config, attention_backward_query_config, attention_backward_key_config):
        assert choose(target, 128, 2, "plain") == choose(other, 128, 2, "plain")
    for columns, itemsize in ((768, 2), (5_000, 4)):
        assert matmul_config(target, columns, columns, itemsize) == matmul_config(other, columns, columns, itemsize)
        norms = [norm_backward_config(t, columns, itemsize, True, True, False) for t in (target, other)]
        assert norms[0] == norms[1]


def newer_tiles(choose, tables):
    """For each entry of the tables of newer versions of Triton: what a version asks for there, and the entry."""
    for scores, families in tables.items():
        of_scores = {"blocks": scores == "blocks", "scores": "plain" if scores in ("blocks", "rest") else scores}
        for family, table in families.items():
            arch = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "small": 120}[family]
            for width, tiles in table.items():
                yield (
                    lambda version, arch=arch, width=width, of_scores=of_scores: choose(
                        Target("cuda", arch, 100, triton_version=version), width, 2, **of_scores
                    ),
                    AttentionConfig(*tiles),
                )


@pytest.mark.parametrize(
    ("choose", "tables"),
    [
        (attention_backward_query_config, attention_config._BACKWARD_QUERY_NEWER),
        (attention_backward_key_config, attention_config._BACKWARD_KEY_NEWER),
    ],
)
def test_newer_versions_of_triton_take_tiles_of_their_own(choose, tables):
    for ask, config in newer_tiles(choose, tables):
        assert ask((3, 8)) == ask((3, 9)) == ask((3, 10)) == config
        assert ask((3, 7)) != config


def test_other_figures_of_newer_versions_of_triton():
    before, after = (Target("cuda", 90, 132, triton_version=version) for version in ((3, 7), (3, 9)))
    assert [attention_backward_query_config(target, 256, 4).hoist for target in (before, after)] == [False, True]
    norms = [norm_backward_config(target, 768, 2, False, False, True) for target in (before, after)]
    assert [norm.max_registers for norm in norms] == [64, None]


def test_a_target_has_the_installed_triton():
    assert Target("cuda", 80, 108).triton_version == tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.mark.parametrize(("backend", "limit"), [("cuda", 64), ("cuda", None), ("hip", 64)])
def test_the_limit_on_registers_reaches_nvidias_compiler_alone(backend, limit, monkeypatch):
    given = {}
    kernel = defaultdict(lambda: lambda **options: given.update(options))
    monkeypatch.setattr(launching, "current_target", lambda: launching.Target(backend, 90, 132))
    launching.launch(kernel, (1,), max_registers=limit)
    assert given.get("maxnreg") == (limit if backend == "cuda" else None)


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [("cuda", 80, "tf32"), ("cuda", 100, "tf32"), ("hip", "gfx942", "tf32"), ("hip", "gfx950", "ieee"), ("hip", "gfx90a", "ieee")],
)  # fmt: skip
def test_tf32_is_asked_of_gpus_that_have_it(backend, arch, expected, monkeypatch):
    """Triton would refuse the others' kernels, as soon as torch.set_float32_matmul_precision("high") was called."""
    given = {}
    kernel = defaultdict(lambda: lambda **options: given.update(options))
    target = launching.Target(backend, 0, 100, launching.has_tf32(GPUTarget(backend, arch, 32)))
    monkeypatch.setattr(launching, "current_target", lambda: target)
    launching.launch(kernel, (1,), PRECISION="tf32")
    assert given["PRECISION"] == expected
