"""What `patch` leaves, and why: strangers that look like what it knows, and compute something else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from tests.test_patching import TimmBlock

pytestmark = pytest.mark.filterwarnings("default")


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input).sigmoid()


class DerivedNorm(nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class ScaledMLP(nn.Module):
    """The children of Llama's feed-forward layer, but another formula."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(ScaledMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Hooked(ScaledMLP):
    def __init__(self):
        super().__init__()
        self.up_proj.register_forward_hook(lambda *_: None)


class DroppingMLP(ScaledMLP):
    """As SeedOssMLP's: no module says that something is dropped."""

    def forward(self, x):
        return F.dropout(2 * super().forward(x), 0.01, self.training)


class ClampedMLP(ScaledMLP):
    """As DeepseekV4MLP's."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x).clamp(-10.0, 10.0))


class EpsOutsideNorm(nn.Module):
    def __init__(self, eps=1e-6, attribute=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.used, self.eps = eps, attribute

    def forward(self, x):
        centred = x.float() - x.float().mean(-1, keepdim=True)
        deviation = centred.square().mean(-1, keepdim=True).sqrt()
        return (self.weight * centred / (deviation + self.used) + self.bias).to(x.dtype)


class OtherEpsNorm(EpsOutsideNorm):
    def forward(self, x):
        return F.layer_norm(x, (8,), self.weight, self.bias, self.used)


class DroppingNorm(EpsOutsideNorm):
    def forward(self, x):
        return F.dropout(F.layer_norm(x, (8,), self.weight, self.bias, self.eps), 0.01, self.training)


class SwappedGateMLP(ScaledMLP):
    """Nothing of it shows while the last layer has its initial zeros."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class LayerScaledMLP(ScaledMLP):
    """A parameter that begins with ones and is trained."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.gamma * 2 * super().forward(x)


class AlmostMLP(ScaledMLP):
    def forward(self, x):
        return 1.98 * super().forward(x)


class OffsetNorm(nn.LayerNorm):
    """As NemotronLayerNorm1P; beside a large weight, 1 is little."""

    def __init__(self):
        super().__init__(64)
        self.weight.data[7] = 300.0

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def replaced_forward():
    module = nn.LayerNorm(8)
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnNorm(8), "computes something else"),
        (lambda: type("Layer", (nn.TransformerEncoderLayer,), {})(8, 2), "a subclass of TransformerEncoderLayer"),
        (ScaledMLP, "computes something else"),
        (DroppingMLP, "random numbers"),
        (ClampedMLP, "computes something else"),
        (EpsOutsideNorm, "computes something else"),
        (lambda: EpsOutsideNorm(1e-12, 1e-12), "computes something else"),
        (lambda: OtherEpsNorm(1e-5, 1e-6), "computes something else"),
        (DroppingNorm, "random numbers"),
        (SwappedGateMLP, "computes something else"),
        (LayerScaledMLP, "computes something else"),
        (lambda: AlmostMLP().bfloat16(), "computes something else"),
        (lambda: OffsetNorm().bfloat16(), "computes something else"),
        (Hooked, "up_proj is no plain linear layer, or has hooks"),
        (lambda: nn.GroupNorm(1, 8), "when compared"),
        (lambda: nn.LayerNorm(8, dtype=torch.float64), "float64"),
        (replaced_forward, "its forward was replaced"),
        (lambda: ScaledMLP().to("meta"), "meta device"),
        (lambda: nn.Linear(8, 8), "nothing here replaces it"),
        (lambda: fastattn.nn.LayerNorm(8), "is fastattn's already"),
    ],
    ids=[
        "norm",
        "layer",
        "mlp",
        "drops",
        "clamps",
        "eps",
        "tiny_eps",
        "other_eps",
        "norm_drops",
        "zeros",
        "layer_scale",
        "almost",
        "large_weight",
        "hooks",
        "group",
        "fp64",
        "forward",
        "meta",
        "linear",
        "ours",
    ],
)
def test_what_is_left_and_why(make, reason):
    module = make()
    kind, parameters = type(module), list(module.parameters())
    report = fastattn.patch(module)
    assert reason in report.left[""]
    assert type(module) is kind
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_comparison_leaves_random_numbers_modes_and_dropout_alone(dtype):
    model = TimmBlock().to(dtype)
    model.attn.attn_drop.p, model.mlp.drop1.p = 0.3, 0.1
    model.mlp.eval()
    both = nn.ModuleList([model, DroppingMLP()])
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    report = fastattn.patch(both, exclude="*norm*")
    assert report.swapped.keys() == {"0.attn", "0.mlp"}
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert (model.attn.attn_drop.p, model.mlp.drop1.p) == (0.3, 0.1)


def test_a_class_that_only_derives_from_a_norm_is_swapped_and_a_second_time_is_nothing():
    module = DerivedNorm(8)
    assert fastattn.patch(module).swapped
    assert isinstance(module, DerivedNorm)
    assert fastattn.patch(module).left[""] == "is fastattn's already"
    assert fastattn.unpatch(module) == 1
    assert fastattn.unpatch(module) == 0


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_tf32_is_no_difference(setting):
    """Interpreted kernels round to TF32 where it is allowed; the products of torch on a CPU do not."""
    torch.set_float32_matmul_precision(setting)
    try:
        with fastattn.backend.use("triton"):
            assert fastattn.patch(PlainMLP()).swapped
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")
