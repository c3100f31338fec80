"""Data flows one way: a module imports what is below it, never what is above, and the two backends know nothing of each other."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fastattn"
# What stands directly in the package is below everything, but for these.
LAYERS = {"kernels": 1, "eager": 1, "ops": 2, "nn": 3, "integrations": 3, "models": 4}
HIGHER = {"adapters": 4, "comparing": 4, "causal_loss": 4, "patching": 5, "warmup": 5, "__init__": 5}


def layer(parts):
    return LAYERS[parts[0]] if parts[0] in LAYERS else HIGHER.get(parts[0], 0)


def imported(tree):
    """The parts of each module of the package that a file names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastattn":
            parts = node.module.split(".")[1:]
            yield from ([parts] if parts else [[name.name] for name in node.names])
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1:] for name in node.names if name.name.startswith("fastattn."))


def test_nothing_imports_what_stands_above_it():
    wrong, seen = [], 0
    for file in PACKAGE.rglob("*.py"):
        parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
        for target in imported(ast.parse(file.read_text())):
            seen += 1
            siblings = parts[0] != target[0] and {parts[0], target[0]} == {"kernels", "eager"}
            if layer(target) > layer(parts) or siblings:
                wrong.append(f"{'.'.join(parts)} imports {'.'.join(target)}")
    assert seen > 300
    assert not wrong
