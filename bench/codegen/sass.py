"""Disassemble a cubin into instructions and labels, with the nvdisasm of Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SECTION = re.compile(r"\s*\.section\s+(\S+?),")
_LABEL = re.compile(r"^(\.L_\w+|\$?[A-Za-z_][\w$.]*):\s*$")
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:\{\s*)?(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<mnemonic>[A-Z][A-Za-z0-9_.]*)\s*(?P<operands>.*?)\s*;?\s*$"
)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: `LDG.E.128 R4, desc[UR4][R2.64]` under `@P0`."""

    address: int
    predicate: str
    mnemonic: str
    operands: str

    @property
    def opcode(self) -> str:
        """The mnemonic without modifiers: LDG."""
        return self.mnemonic.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.mnemonic.split(".")[1:]


@dataclass(frozen=True)
class Program:
    """The code of one kernel; `labels` maps a label to the index of the instruction after it."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, opcode: str) -> int:
        return sum(instruction.opcode == opcode for instruction in self.instructions)


def run_nvidia_tool(tool: str, *options: str, binary: bytes) -> str:
    """Standard output of cuobjdump or nvdisasm for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_TOOLS / tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> Program:
    """The largest code section of `cubin`: the kernel. Raises ValueError where there is none."""
    # without its analysis of the data flow the text is the same, a fifth sooner
    return parse(run_nvidia_tool("nvdisasm", "-c", "-ndf", binary=cubin))


def parse(text: str) -> Program:
    """The program in nvdisasm's output."""
    programs: list[Program] = []
    current: Program | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            current = Program([], {}) if section[1].startswith(".text.") else None
            if current:
                programs.append(current)
        elif current is None:
            continue
        elif label := _LABEL.match(line):
            current.labels[label[1]] = len(current.instructions)
        elif match := _INSTRUCTION.match(line):
            predicate = (match["predicate"] or "").strip()
            instruction = Instruction(int(match["address"], 16), predicate, match["mnemonic"], match["operands"])
            current.instructions.append(instruction)
    if not programs:
        raise ValueError("the disassembly has no code section")
    return max(programs, key=lambda program: len(program.instructions))
