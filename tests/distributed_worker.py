"""Training runs, alone or on several processes: what each process of tests/test_distributed.py and test_parallel.py runs."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastattn
from fastattn.models import GPT, GPTConfig
from fastattn.models.tensor_parallel import tensor_parallel
from fastattn.nn.parallel import HeadsParallel

WRAPPERS = ("ddp", "fsdp", "fsdp_linears")
STEPS, BATCH, LENGTH, WIDTH = 3, 4, 6, 16


class Encoder(nn.Module):
    """Ours, or torch's that was patched; returns a loss."""

    def __init__(self, patched: bool) -> None:
        super().__init__()
        library = nn if patched else fastattn.nn
        layer = library.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = library.TransformerEncoder(layer, 2, library.LayerNorm(WIDTH), enable_nested_tensor=False)
        if patched:
            fastattn.patch(self)

    def forward(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - x.flip(1)).square().mean()


class LanguageModel(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        sizes = {"vocab_size": 40, "context_length": LENGTH, "num_layers": 2, "num_heads": 4, "d_model": WIDTH}
        self.gpt = GPT(GPTConfig(**sizes, **options))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 20).long().clamp(max=39)
        return self.gpt(tokens, tokens.roll(-1, 1))[1]


class PatchedLlama(nn.Module):
    """transformers' Llama, whose projections are layers of their own, so that a plan can give each process its heads."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=40, hidden_size=WIDTH, intermediate_size=24, **heads)
        self.llama = LlamaForCausalLM(config)
        fastattn.patch(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 20).long().clamp(max=39)
        return self.llama(tokens, labels=tokens).loss


# Tensor parallelism: the first product's columns and the second's rows, heads and hidden features, are each process's own.
PLANS = {
    "encoder": {
        "encoder.layers.*.self_attn": HeadsParallel(),
        "encoder.layers.*.linear1": ColwiseParallel(),
        "encoder.layers.*.linear2": RowwiseParallel(),
    },
    "llama": {
        **{f"llama.model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"llama.model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "llama.model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "llama.model.layers.*.mlp.down_proj": RowwiseParallel(),
    },
}
MODELS = {"encoder": lambda: Encoder(False), "patched": lambda: Encoder(True), "gpt": LanguageModel}
TENSOR_PARALLEL = {
    "encoder": MODELS["encoder"],
    "gpt": LanguageModel,
    "gated": lambda: LanguageModel(gated=True, activation="silu", positions="rotary", num_kv_heads=2),
    "llama": PatchedLlama,
}


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.gpt.blocks if isinstance(model, LanguageModel) else model.encoder.layers)


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp_linears":
        for module in [m for m in model.modules() if type(m) is nn.Linear]:
            fully_shard(module)
    if how.startswith("fsdp"):
        for block in blocks(model):
            fully_shard(block)
        return fully_shard(model)
    return model


def patch_wrapped() -> dict[str, dict[str, str]]:
    """What `patch` swaps in a model that DistributedDataParallel holds, and why it leaves one that FSDP2 has sharded."""
    encoder = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
    swapped = fastattn.patch(DistributedDataParallel(encoder)).swapped
    return {"swapped": swapped, "left": fastattn.patch(fully_shard(nn.LayerNorm(WIDTH))).left}


def shared_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs of tensors that are shared among the processes along their first dimension, and torch's of the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    x, (w1, w2) = torch.randn(2, 4, LENGTH, 8), torch.randn(2, 8, 8)
    calls = {
        "rms_norm": (lambda f, x, *w: f(x, (8,), w[0][0]), fastattn.rms_norm, F.rms_norm),
        "layer_norm": (lambda f, x, *w: f(x.bfloat16(), (8,)), fastattn.layer_norm, F.layer_norm),
        "linear": (lambda f, x, *w: f(x, w[0], w[1][0]), fastattn.linear, F.linear),
        "attention": (
            lambda f, x, *w: f(x, x, x), fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention,
        ),
        "cross_entropy": (
            lambda f, x, *w: f(x.flatten(0, 2), x.flatten(0, 2)[:, 0].long().abs() % 8), fastattn.cross_entropy, F.cross_entropy,
        ),
    }  # fmt: skip
    results = {}
    for name, (call, ours, theirs) in calls.items():
        shared = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        out = call(ours, shared, *(distribute_tensor(w, mesh, [Replicate()]) for w in (w1, w2)))
        out.sum().backward()
        results[name] = out.full_tensor().detach(), call(theirs, x, w1, w2)
    return results


def attention_of_shares() -> tuple[dict[str, tuple[list[Tensor], list[Tensor]]], dict[str, str]]:
    """Outputs and gradients of attention over distributed tensors, and those of the whole; and the messages of errors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    results, names = {}, ("query", "key", "value", "bias", "sinks")
    batch, heads, length = Shard(0), Shard(1), Shard(2)
    cases: dict[str, tuple[list[Any], int, int, tuple[int, ...]]] = {  # placements, heads, key heads, the bias's shape
        "batch": ([batch] * 3, 4, 2, (4, LENGTH, LENGTH)),
        "heads": ([heads] * 3, 4, 2, (3, 1, LENGTH, LENGTH)),
        "one key head": ([heads, Replicate(), Replicate()], 4, 1, (3, 4, 1, LENGTH)),
        "heads that cannot be shared": ([heads] * 3, 3, 3, (1, 1, LENGTH, LENGTH)),
        "replicated": ([Replicate()] * 3, 4, 2, (LENGTH, LENGTH)),
        "length": ([length] * 3, 4, 2, (4, LENGTH, LENGTH)),
    }
    for name, (placements, num_heads, kv_heads, bias_shape) in cases.items():
        shape, kv_shape = ((3, n, LENGTH, 8) for n in (num_heads, kv_heads))  # three batches on two processes
        whole = [random(*s) for s in (shape, kv_shape, kv_shape, bias_shape, (num_heads,))]
        shares = [distribute_tensor(t, mesh, [p]) for t, p in zip(whole, placements)]
        shares += [whole[3].clone(), distribute_tensor(whole[4], mesh, [Shard(0)])]
        options = {
            "mask": random(3, 1, LENGTH, LENGTH) > -1, "alibi_slopes": random(num_heads).abs(), "window": (4, 0), "softcap": 3.0,
        }  # fmt: skip
        found = []
        for tensors in (shares, whole):
            arguments = dict(zip(names, [t.requires_grad_() for t in tensors]), **options)
            outputs = fastattn.attention(**arguments, return_lse=True)
            outputs = [t.full_tensor() if isinstance(t, DTensor) else t for t in outputs]
            grads = torch.autograd.grad(sum(t.sin().sum() for t in outputs), tensors, create_graph=True)
            seconds = torch.autograd.grad(sum(g.square().sum() for g in grads[:3]), tensors[:3])
            maps = {name: argument for name, argument in arguments.items() if name != "value"}
            weights = [fastattn.attention_weights(**maps), fastattn.attention_column_sums(**maps)]
            everything = [*outputs, *grads, *seconds, *weights]
            found.append([t.full_tensor().detach() if isinstance(t, DTensor) else t.detach() for t in everything])
        results[name] = found[0], found[1]
    blocks = fastattn.BlockMask.document(torch.tensor([[0] * 4 + [1] * 2, [0] * 3 + [1] * 3]))
    x = random(2, 2, LENGTH, 8)
    shared = distribute_tensor(x, mesh, [batch])
    got, expected = (fastattn.attention(t, t, t, mask=blocks) for t in (shared, x))
    results["block mask"] = [got.full_tensor()], [expected]
    messages = {}
    for name, call in {
        "mixed": lambda: fastattn.attention(shared, x, x),
        "dropout": lambda: fastattn.attention(shared, shared, shared, dropout_p=0.5),
    }.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return results, messages


def train(name: str, how: str = "alone") -> list[float]:
    """The losses of `STEPS` steps over the same data, whatever the number of processes."""
    torch.manual_seed(0)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = (TENSOR_PARALLEL if how.startswith("tensor") else MODELS)[name]()
    if how == "tensor_parallel":
        mesh = init_device_mesh("cpu", (world,))
        if isinstance(model, LanguageModel):
            tensor_parallel(model.gpt, mesh)
        else:
            parallelize_module(model, mesh, PLANS[name])
        shared = [m for m in model.modules() if type(m) is nn.Linear and isinstance(m.weight, DTensor)]
        heads = [m for m in model.modules() if isinstance(m, fastattn.nn.MultiheadAttention)]
        assert all(m.q_proj_weight.to_local().shape == (WIDTH // world, WIDTH) for m in heads)
        assert len(shared) == 2 * {"encoder": 2, "gpt": 6, "gated": 7, "llama": 7}[name]  # in two layers
    model, data = wrap(model, how), torch.randn(BATCH, LENGTH, WIDTH)
    if not how.startswith("tensor"):
        data = data.chunk(world)[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append((total / world).item())
    return losses


def generated_and_saved(folder: Path) -> dict[str, list[Tensor]]:
    """For each way to share a GPT's parameters: what it generates alone, when shared, and when it was saved and loaded."""
    results = {}
    for name, options in (("fsdp", {}), ("tensor_parallel", {}), ("gated", {"gated": True, "positions": "rotary"})):
        torch.manual_seed(0)
        model = GPT(GPTConfig(40, 16, 2, 4, WIDTH, **options))
        prompt = torch.randint(40, (2, 5))
        whole = model.generate(prompt, 6, temperature=0)
        if name == "fsdp":
            for module in (*model.blocks, model):
                fully_shard(module)
        else:
            tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        shared = model.generate(prompt, 6, temperature=0)
        model.save_pretrained(folder / name)
        loaded = GPT.from_pretrained(folder / name)
        results[name] = [whole, shared, loaded.generate(prompt, 6, temperature=0)]
        assert model(prompt, prompt)[1].item() > 0.0  # (the processes can go on)
    return results


def _prepare() -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", FASTATTN_BACKEND="eager")
    torch.set_num_threads(1)


def run_all(rank: int, world: int, folder: str) -> None:
    """What each of `world` processes runs: every case, one after the other; the results go to `folder`."""
    _prepare()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(Path(folder) / "store"), world), rank=rank, world_size=world
    )
    cases = [(name, how) for name in MODELS for how in WRAPPERS] + [
        (name, "tensor_parallel") for name in TENSOR_PARALLEL
    ]
    results = {
        "losses": {(name, how): train(name, how) for name, how in cases},
        "patched": patch_wrapped(),
        "shared": shared_inputs(),
        "attention": attention_of_shares(),
        "generated": generated_and_saved(Path(folder)),
    }
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


def run_script(rank: int, world: int, path: str, runs: dict[int, list[str]]) -> None:
    """A script with each of `runs`, one after the other, in the environment that torchrun gives process `rank` of `world`.

    As there, a store of the parent's is where they meet: the key of each run is its port.
    """
    _prepare()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    sys.path.insert(0, str(Path(path).parent))
    main = runpy.run_path(path)["main"]
    for port, arguments in runs.items():
        os.environ["MASTER_PORT"] = str(port)
        if status := main(arguments):
            raise SystemExit(status)
