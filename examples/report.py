"""One page about a run: results, curves, samples, configuration and environment, in a single HTML file.

Pictures are inside the page, and it loads nothing, so that it can be sent to somebody or kept for years.
"""

from __future__ import annotations

import base64
import html
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.models.pretrained import atomic_write

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "scikit-learn", "matplotlib")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } th, td { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top }
th { font-weight: 400; color: #666 } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
img { max-width: 100%; display: block } pre { background: #f6f6f6; padding: 1rem; white-space: pre-wrap }
"""


def write_report(
    path: Path,
    title: str,
    *,
    results: Mapping[str, Any],
    pictures: Sequence[Path],
    settings: Mapping[str, Any],
    samples: Mapping[str, str] | None = None,
) -> None:
    """Write the page to `path`.

    Args:
        path: of the HTML file.
        title: its heading.
        results: what came out; numbers are shown with four digits.
        pictures: PNG files.
        settings: what the run was given; a value that is a mapping becomes a table of its own.
        samples: texts that the model wrote, each under its name.
    """
    flat = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(results),
        "<h2>Curves</h2>",
        *(_picture(picture) for picture in pictures),
        *(["<h2>Samples</h2>"] if samples else []),
        *(f"<p>{html.escape(name)}</p><pre>{html.escape(text)}</pre>" for name, text in (samples or {}).items()),
        "<h2>Configuration</h2>",
        _table(flat),
        *(f"<h3>{html.escape(name)}</h3>{_table(group)}" for name, group in groups.items()),
        "<h2>Environment</h2>",
        _table(environment()),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    with atomic_write(path) as file:
        file.write(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'.encode())
        file.write("\n".join([*parts, "</body></html>\n"]).encode())


def environment() -> dict[str, str]:
    """The command, the time, the machine, and the versions of what computes."""
    if torch.accelerator.is_available():
        device = torch.get_device_module().get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    found = {distribution.name: distribution.version for distribution in metadata.distributions()}
    versions = {name: found[name] for name in PACKAGES if name in found}
    return {
        "written": datetime.now(timezone.utc).isoformat(" ", "seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": device,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "fastattn": fastattn.__version__,
        **versions,
    }


def _processor() -> str:
    """The model's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    lines = (f"<tr><th>{html.escape(str(name))}</th><td>{cell(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
