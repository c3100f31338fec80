"""What one machine instruction costs: the pipe that executes it, for how many cycles, and what it computes or moves.

Cycles are those of a whole multiprocessor for one warp's execution; `hardware` states the rates and their sources.

* Warp-level MMA (HMMA) computes the tile in its name once per warp; warpgroup MMA (HGMMA.64xNxK) once per four warps;
  tcgen05 (UTCHMMA) once per block, its shape read from the instruction descriptor.
* Operands that MMA reads from shared memory count as traffic there (A and B; A is free when it is in registers).
* F2FP packs two fp32 into a 16-bit pair on the integer pipe; all other conversions share the special-function unit.
* IMAD runs on one half of the FMA pipe: 64 per clock, and it shares that pipe with fp32 arithmetic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bench.codegen.hardware import Multiprocessor
from bench.codegen.sass import Instruction, Program

WARP = 32
_WARP_MMA = {"HMMA", "IMMA", "QMMA", "OMMA"}
_WARPGROUP_MMA = {"HGMMA", "IGMMA", "QGMMA", "BGMMA"}
_BLOCK_MMA = {"UTCHMMA": 16, "UTCIMMA": 32, "UTCQMMA": 32, "UTCOMMA": 64}  # depth of one instruction
_WARP_MMA_SHAPES = {
    "16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16864": (16, 8, 64),
    "1684": (16, 8, 4), "884": (8, 8, 4), "8816": (8, 8, 16), "8832": (8, 8, 32),
}  # fmt: skip

_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "I2I", "POPC", "FLO", "BREV", "REDUX"}
_FP32 = {"FADD", "FMUL", "FFMA", "FSWZADD", "FADD32I", "FFMA32I", "FMUL32I", "FHADD", "FHFMA", "FHMUL"}
_FP32_PAIR = {"FADD2", "FMUL2", "FFMA2"}
_INTEGER_MULTIPLY = {"IMAD", "IMUL", "IDP", "IDP4A", "IMAD32I", "XMAD"}
_HALF_PAIR = {"HADD2", "HMUL2", "HFMA2", "HADD2_32I", "HMUL2_32I"}
_FP64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMMA"}
_INTEGER = {
    "IADD3", "IADD", "LOP3", "LOP", "SHF", "SHL", "SHR", "LEA", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "FMNMX",
    "FMNMX3", "IMNMX", "VIMNMX", "VIMNMX3", "VIADD", "VIADDMNMX", "MOV", "MOV64", "P2R", "R2P", "PLOP3", "PSETP",
    "SGXT", "BMSK",
    "IABS", "CS2R", "FSET", "VABSDIFF", "VABSDIFF4", "VHMNMX", "HMNMX2", "HSETP2", "HSET2", "MOVM", "FCHK", "VOTE",
    "LEPC", "CREDUX", "UNPACK",
}  # fmt: skip
_PACK = {"F2FP", "I2FP", "F2IP", "I2IP"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS"}
_GLOBAL_STORES = {"STG", "ST", "RED", "ATOM", "ATOMG", "REDG"}
_LOCAL = {"LDL", "STL"}
_TENSOR_MEMORY = {"LDTM": 2048, "STTM": 1024}  # bytes per clock


@dataclass(frozen=True)
class Cost:
    """`cycles` per pipe; `multiply_adds`, `shared_bytes` and `global_bytes` of one execution by one warp."""

    kind: str
    cycles: dict[str, float] = field(default_factory=dict)
    multiply_adds: float = 0.0
    ideal_tensor_cycles: float = 0.0
    shared_bytes: float = 0.0
    global_bytes: float = 0.0
    local_bytes: float = 0.0


def cost(program: Program, index: int, processor: Multiprocessor, warps: int) -> Cost:
    """The cost of instruction `index`; an instruction that no pipe is charged for still takes its issue slot."""
    instruction = program.instructions[index]
    opcode = instruction.opcode
    if instruction.predicate == "@!PT":
        return Cost("other")  # never executed: ptxas puts such loads around the waits for asynchronous copies
    if opcode in _WARP_MMA:
        return _warp_mma(instruction, processor)
    if opcode in _WARPGROUP_MMA:
        return _warpgroup_mma(instruction, processor)
    if opcode in _BLOCK_MMA:
        return _block_mma(program, index, processor, warps)
    if opcode in _SHARED:
        size = access_bytes(instruction) * WARP
        cycles = {"shared": max(1.0, size / processor.shared), "load/store": 1.0}
        return Cost("shared", cycles, shared_bytes=size)
    if opcode in _GLOBAL_LOADS | _GLOBAL_STORES:
        size = access_bytes(instruction) * WARP
        cycles = {"load/store": 1.0, "L2": size / processor.l2}
        if opcode == "LDGSTS":
            cycles["shared fill"] = max(1.0, size / processor.shared)
        return Cost("global load" if opcode in _GLOBAL_LOADS else "global store", cycles, global_bytes=size)
    if opcode in _LOCAL:
        size = access_bytes(instruction) * WARP
        return Cost("spill", {"load/store": 1.0, "shared": size / processor.shared}, local_bytes=size)
    if opcode in _TENSOR_MEMORY:
        repeats = re.search(r"\.x(\d+)", instruction.mnemonic)
        size = (int(repeats[1]) if repeats else 1) * 4 * WARP
        return Cost("tensor memory", {"tensor memory": size / _TENSOR_MEMORY[opcode]})
    return _arithmetic(instruction, processor)


def access_bytes(instruction: Instruction) -> int:
    """Bytes per lane that a load or store moves."""
    if instruction.opcode in ("LDSM", "STSM"):
        matrices = next((int(m) for m in instruction.modifiers if m in ("2", "4")), 1)
        return 4 * matrices
    for modifier, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if modifier in instruction.modifiers:
            return size
    return 4


def _arithmetic(instruction: Instruction, processor: Multiprocessor) -> Cost:
    opcode = instruction.opcode
    if opcode in _SPECIAL:
        return Cost("special" if opcode == "MUFU" else "convert", {"special": WARP / processor.special})
    if opcode in _PACK:
        return Cost("convert", {"integer": WARP / processor.integer})
    if opcode in _FP32:
        return Cost("fp32", {"fp32 lanes": WARP})
    if opcode in _FP32_PAIR:
        return Cost("fp32", {"fp32 lanes": 2 * WARP})
    if opcode in _HALF_PAIR:
        return Cost("half", {"fp32 lanes": WARP})
    if opcode in _INTEGER_MULTIPLY:
        wide = 2 if {"WIDE", "HI"} & {*instruction.modifiers} else 1
        return Cost("integer multiply", {"multiply lanes": wide * WARP})
    if opcode in _FP64:
        return Cost("fp64", {"fp64": WARP / processor.fp64})
    if opcode in _INTEGER:
        return Cost("integer", {"integer": WARP / processor.integer})
    if opcode == "SHFL":
        return Cost("shuffle", {"shared": 1.0, "load/store": 1.0})
    if opcode.startswith("U"):
        return Cost("uniform", {"uniform": 0.5})
    return Cost("other")


def _rate(instruction: Instruction) -> float:
    """The tensor rate of an element type, as a multiple of bf16's."""
    if "TF32" in instruction.mnemonic:
        return 0.5
    if instruction.opcode in ("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCIMMA", "UTCQMMA"):
        return 2.0
    return 4.0 if instruction.opcode in ("OMMA", "UTCOMMA") else 1.0


def _warp_mma(instruction: Instruction, processor: Multiprocessor) -> Cost:
    shape = next(_WARP_MMA_SHAPES[m] for m in instruction.modifiers if m in _WARP_MMA_SHAPES)
    multiply_adds = shape[0] * shape[1] * shape[2]
    ideal = multiply_adds / (processor.tensor * _rate(instruction))
    return Cost("tensor", {"tensor": ideal / processor.warp_level_share}, multiply_adds, ideal)


def _warpgroup_mma(instruction: Instruction, processor: Multiprocessor) -> Cost:
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.mnemonic)
    assert shape is not None, instruction.mnemonic
    rows, columns, depth = map(int, shape.groups())
    rate = _rate(instruction)
    element_bytes = 2 / rate
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    a_is_in_registers = len(operands) > 1 and re.match(r"R\d+", operands[1]) is not None
    shared = (columns + (0 if a_is_in_registers else rows)) * depth * element_bytes / 4
    multiply_adds = rows * columns * depth / 4  # four warps issue it together
    ideal = multiply_adds / (processor.tensor * rate)
    cycles = {"tensor": ideal, "shared": shared / processor.shared}
    return Cost("tensor", cycles, multiply_adds, ideal, shared_bytes=shared)


def _block_mma(program: Program, index: int, processor: Multiprocessor, warps: int) -> Cost:
    instruction = program.instructions[index]
    descriptor = _instruction_descriptor(program, index)
    if descriptor is None:
        raise ValueError(f"cannot read the shape of {instruction.mnemonic} {instruction.operands}")
    columns, rows = (descriptor >> 17 & 0x3F) * 8, (descriptor >> 24 & 0x1F) * 16
    is_tf32 = instruction.opcode == "UTCHMMA" and descriptor >> 7 & 7 == 2
    depth, rate = (8, 0.5) if is_tf32 else (_BLOCK_MMA[instruction.opcode], _rate(instruction))
    a_is_in_tensor_memory = instruction.operands.startswith("tmem")
    shared = (columns + (0 if a_is_in_tensor_memory else rows)) * depth * 2 / rate
    multiply_adds = rows * columns * depth
    ideal = multiply_adds / (processor.tensor * rate)
    cycles = {"tensor": ideal * (2 if rows == 64 else 1), "shared": shared / processor.shared}
    # one thread of one warp issues it; the caller multiplies by the warps of the block
    cycles = {pipe: value / warps for pipe, value in cycles.items()}
    return Cost("tensor", cycles, multiply_adds / warps, ideal / warps, shared_bytes=shared / warps)


def _instruction_descriptor(program: Program, index: int) -> int | None:
    """The constant last moved into the register of idesc[...] (PTX ISA, tcgen05, "Instruction descriptor")."""
    register = re.search(r"idesc\[(UR\d+)\]", program.instructions[index].operands)
    if register is None:
        return None
    constant = re.compile(rf"{register[1]},\s*(0x[0-9a-f]+)\s*$")
    for instruction in reversed(program.instructions[:index]):
        if instruction.opcode == "UMOV" and (match := constant.match(instruction.operands)):
            return int(match[1], 16)
    return None
