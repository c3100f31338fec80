"""Compiling ahead: what was warmed is found again, at other lengths and batch sizes, by a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from fastattn.kernels.stand_in import StandInDriver
from fastattn.kernels.targets import TARGETS
from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig
from fastattn.warmup import GPT2, main, read_config, warm

CONFIG = GPTConfig(512, context_length=600, num_layers=2, num_heads=2, d_model=64, norm="rms_norm", positions="rotary")
LATER = """
import json, sys, torch
from fastattn import warmup
model = warmup.GPT.from_pretrained(sys.argv[1]).train()
tokens = torch.zeros(3, 100, dtype=torch.long)

def steps():
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens)[1].backward()
    half = model.bfloat16().eval()
    half.generate(tokens[:, :70], 3)
    half.generate(tokens[:1].repeat(1, 5), 2)

print(json.dumps([(found.kernel, found.cached) for found in warmup.warm(steps, sys.argv[2])]))
"""

NORM = """
import torch, fastattn
from fastattn.warmup import warm
x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), torch.ones(64)

def under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        fastattn.layer_norm(x, 64, weight)

def as_on_a_gpu():
    torch.ops.fastattn.norm(x, None, None, weight, None, None, None, 1, 1e-5, True, 0.0, 0.0, torch.float32, torch.bfloat16)

calls = (under_autocast, "sm_90"), (as_on_a_gpu, "sm_90"), (as_on_a_gpu, "sm_80")
print([[found.cached for found in warm(*call)] for call in calls])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    GPT(CONFIG).save_pretrained(folder)
    return folder


def python(cache, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("FASTATTN_BACKEND", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_warm_cache_has_every_kernel_of_a_later_run(saved, tmp_path):
    said = python(tmp_path, "-m", "fastattn.warmup", saved, "--arch", "sm_90").splitlines()
    count = len(said) - 2
    assert said[0] == f"GPT for sm_90 (H100), bf16, into {tmp_path}"
    assert all("compiled in" in line for line in said[1:-1])
    assert said[-1].startswith(f"{count} kernels: {count} compiled in ")
    assert said[-1].endswith(", 0 were there")
    later = json.loads(python(tmp_path, "-c", LATER, saved, "sm_90"))
    kernels = {
        "attention_forward",
        "attention_backward_key",
        "_decode",
        "_merge",
        "rotary_kernel",
        "cross_entropy_kernel",
    }
    assert kernels <= {name for name, _ in later}
    assert [name for name, cached in later if not cached] == []


def test_norms_are_autocast_as_on_a_gpu(tmp_path):
    """To fp32, where the CPU, whose tensors stand in for the GPU's, leaves them in 16 bits: one kernel, which a GPU asks for."""
    said = python(tmp_path, "-c", NORM)
    assert said == "[[False], [], [False]]\n", "the second call's kernel was there, but not another GPU's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_91"], "unknown architecture 'sm_91'; known: sm_80 (A100)"),
        (["--arch", "sm_90", "--steps", "training,flying"], "got flying"),
        (["/nowhere", "--arch", "sm_90"], "the folder /nowhere does not exist"),
        ([], "--arch must be given"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("fastattn.warmup.this_machines", lambda: None)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_steps_that_a_classifier_does_not_have(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    Classifier(ClassifierConfig(50, 3, d_model=32)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--arch", "sm_90", "--steps", "generation,packed"])
    assert "--steps of a Classifier must have training, which is all it does" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SystemExit):
        main(["--arch", "sm_90"])
    assert "TRITON_CACHE_DIR names another folder" in capsys.readouterr().err


def test_a_cache_without_a_name(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    with pytest.raises(SystemExit):
        main(["--arch", "sm_90"])
    assert "TRITON_CACHE_DIR names another folder: it is empty" in capsys.readouterr().err


def test_an_end_in_the_middle_is_no_traceback(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fastattn.warmup.warm", interrupted)
    assert main(["--arch", "sm_90"]) == 130
    assert capsys.readouterr().err == "stopped; what was compiled is in the cache\n"


def test_a_folders_config_is_read_without_its_weights(tmp_path):
    Classifier(ClassifierConfig(50, 3, d_model=32)).save_pretrained(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert read_config(tmp_path) == (Classifier, ClassifierConfig(50, 3, d_model=32))
    settings = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    kind, config = read_config(tmp_path)
    assert kind is GPT
    assert (config.d_model, config.num_heads, config.vocab_size) == (GPT2.d_model, GPT2.num_heads, GPT2.vocab_size)


def test_what_was_warmed_is_no_kernel_of_a_real_gpu():
    """Triton, and the choice of tiles, keep what they know of a device by its number: a process may warm and then launch."""
    numbers = {StandInDriver(target).get_current_device() for target in TARGETS.values()}
    assert len(numbers) == len(TARGETS)
    assert max(numbers) < 0


def test_an_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is 1"):
        warm(lambda: None, "sm_90")
