"""Under torch.compile on a CPU, ops that only pass over memory are their definitions, which the compiler fuses; all others stay ops."""

import pytest
import torch

import fastattn
from fastattn.eager import products
from fastattn.nn import plain
from tests.test_transforms import seeded

X, GAIN = torch.randn(2, 3, 4, 8), torch.ones(8)
COS, SIN = fastattn.rotary_tables(8, 16)
DEFINITIONS = {
    "norm": lambda x: fastattn.layer_norm(x, 8, GAIN, GAIN, residual=x)[0],
    "rotary": lambda x: fastattn.rotary(x, x, COS, SIN, offset=3)[0],
}
OPS = {
    "norm with dropout": lambda x: fastattn.layer_norm(x, 8, GAIN, dropout_p=0.5),
    "rotary at positions, which are checked": lambda x: fastattn.rotary(x, x, COS, SIN, positions=torch.arange(4))[0],
    "attention": lambda x: fastattn.attention(x, x, x),
}


class Recorder:
    """A compiler that runs its graphs as they are.

    Attributes:
        ours: whether each of them has an op of ours.
    """

    def __init__(self):
        self.ours = []

    def __call__(self, graph, _):
        self.ours.append(any(str(node.target).startswith("fastattn.") for node in graph.graph.nodes))
        return graph


@pytest.mark.parametrize("name", [*DEFINITIONS, *OPS])
def test_what_is_left_to_the_compiler(name):
    """The two backends have graphs of their own: a switch between them is noticed."""
    torch.compiler.reset()
    recorder, function = Recorder(), (DEFINITIONS | OPS)[name]
    compiled = torch.compile(function, fullgraph=True, backend=recorder)
    for backend in ("eager", "triton", "eager"):
        with fastattn.backend.use(backend):
            got = [seeded(f, X) for f in (compiled, function)]
        torch.testing.assert_close(*got)
    assert recorder.ours == ([False, True] if name in DEFINITIONS else [True] * len(recorder.ours))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (3, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("name", [*DEFINITIONS, "partial rotary"])
def test_definitions_lie_in_memory_as_the_ops_do(name, order):
    """What a model makes of a result may be a view, with its own strides."""
    partial = lambda x: fastattn.rotary(x, None, COS[:, :2], SIN[:, :2])[0]  # noqa: E731
    x, function = torch.randn(8, 8, 8, 8).permute(order), DEFINITIONS.get(name, partial)
    for compiler in ("eager", "aot_eager"):
        torch.compiler.reset()
        with fastattn.backend.use("eager"):
            got, expected = torch.compile(function, fullgraph=True, backend=compiler)(x), function(x)
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_an_exported_program_keeps_its_ops(name):
    class Module(torch.nn.Module):
        def forward(self, x):
            return DEFINITIONS[name](x)

    with fastattn.backend.use("eager"):
        for strict in (False, True):
            graph = torch.export.export(Module(), (X,), strict=strict).graph
            assert any(str(node.target).startswith("fastattn.") for node in graph.nodes)


@pytest.mark.parametrize("emulated", [False, True])
def test_linear_layers_of_models(emulated, monkeypatch):
    """In 16 bits, on a CPU without instructions for them, the faster product is taken under a compiler, too."""
    monkeypatch.setattr(products, "_emulates", lambda dtype: emulated and dtype == torch.bfloat16)
    layer = torch.nn.Linear(8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        x, recorder = torch.randn(64, 8), Recorder()
        torch.compiler.reset()
        compiled = torch.compile(lambda x: plain.call_linear(layer, x), fullgraph=True, backend=recorder)
        with fastattn.backend.use("eager"), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            got, expected = compiled(x), layer(x)
        torch.testing.assert_close(got, expected)
        assert got.dtype == dtype
        assert recorder.ours == [emulated and dtype == torch.bfloat16]
        torch._dynamo.mark_dynamic(x, 0, min=2, max=100)  # whatever the number of rows, the graph is the same
        with fastattn.backend.use("eager"), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            torch.compiler.reset()
            compiled(x)
            torch.testing.assert_close(compiled(x[:3]), layer(x[:3]))
        assert len(recorder.ours) == 2


def test_a_profiler_sees_what_runs_without_it(monkeypatch):
    monkeypatch.setattr(products, "_emulates", lambda dtype: dtype == torch.bfloat16)
    layer, x = torch.nn.Linear(8, 8).bfloat16(), torch.randn(64, 8).bfloat16()
    with fastattn.backend.use("eager"), torch.profiler.profile(acc_events=True) as seen:
        got = plain.call_linear(layer, x)
    assert any(event.key == "fastattn::linear" for event in seen.key_averages())
    with fastattn.backend.use("eager"):
        assert torch.equal(got, plain.call_linear(layer, x))
