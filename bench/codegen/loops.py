"""Control flow of a machine program: basic blocks, and the natural loops among them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.codegen.sass import Instruction, Program

_JUMPS = {"BRA", "BRX", "JMP", "JMX", "BRXU", "JMXU"}
_EXITS = {"EXIT", "RET"}
_WAITS = {"SYNCS", "UTCATOMSWS", "NANOSLEEP"}  # polled in a spin loop
_SPIN_LOOP_LENGTH = 12
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Block:
    """Instructions start..stop-1 run one after the other; `successors` are indices of blocks."""

    start: int
    stop: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """`instructions` are the indices of the loop's own instructions, without those of loops inside it."""

    header: int
    instructions: tuple[int, ...]
    is_innermost: bool


def basic_blocks(program: Program) -> list[Block]:
    """Split at labels and after jumps, and link the parts."""
    instructions = program.instructions
    starts = {0} | {index for index in program.labels.values() if index < len(instructions)}
    starts |= {i + 1 for i, x in enumerate(instructions[:-1]) if x.opcode in _JUMPS | _EXITS}
    ordered = sorted(starts)
    block_at = {start: number for number, start in enumerate(ordered)}
    blocks = []
    for number, start in enumerate(ordered):
        stop = ordered[number + 1] if number + 1 < len(ordered) else len(instructions)
        last = instructions[stop - 1]
        successors = []
        if last.opcode in _JUMPS:
            labels = [program.labels[label] for label in _TARGET.findall(last.operands) if label in program.labels]
            successors += [block_at[index] for index in labels if index in block_at]
        if _falls_through(last) and number + 1 < len(ordered):
            successors.append(number + 1)
        blocks.append(Block(start, stop, tuple(dict.fromkeys(successors))))
    return blocks


def find_loops(program: Program) -> list[Loop]:
    """The loops in order of their addresses; loops that only wait for a barrier are left out."""
    blocks = basic_blocks(program)
    bodies: dict[int, set[int]] = {}
    predecessors: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(number)
    dominators = _dominators(predecessors)
    for number, block in enumerate(blocks):
        for header in block.successors:
            if dominators[number] >> header & 1:
                bodies.setdefault(header, {header}).update(_body(header, number, predecessors))

    def indices(body: set[int]) -> tuple[int, ...]:
        return tuple(index for number in sorted(body) for index in range(blocks[number].start, blocks[number].stop))

    innermost = {header for header, body in bodies.items() if not any(other < body for other in bodies.values())}
    spinning = {header: bodies[header] for header in innermost if _is_spin_loop(program, indices(bodies[header]))}
    working = {header: body for header, body in bodies.items() if header not in spinning}
    loops = []
    for header in sorted(working):
        body = working[header]
        inside = [other for other in working if other != header and working[other] < body]
        own = body.difference(*(working[other] for other in inside), *spinning.values())
        loops.append(Loop(header, indices(own), not inside))
    return loops


def _falls_through(last: Instruction) -> bool:
    if last.opcode == "BRA":  # unconditional only if nothing stands before the target: BRA.U UP0, `(.L_x_1)
        return bool(last.predicate) or not last.operands.startswith("`")
    if last.opcode in _JUMPS | _EXITS:
        return bool(last.predicate)
    return True


def _dominators(predecessors: list[list[int]]) -> list[int]:
    """For each block the set of blocks on every path to it, as bits of an integer."""
    everything = (1 << len(predecessors)) - 1
    dominators = [everything if before else 1 << number for number, before in enumerate(predecessors)]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for number, before in enumerate(predecessors):
            if number == 0 or not before:
                continue
            common = everything
            for predecessor in before:
                common &= dominators[predecessor]
            common |= 1 << number
            changed |= common != dominators[number]
            dominators[number] = common
    return dominators


def _body(header: int, tail: int, predecessors: list[list[int]]) -> set[int]:
    """All blocks that reach `tail` without passing `header`."""
    body, pending = {header}, [tail]
    while pending:
        number = pending.pop()
        if number not in body:
            body.add(number)
            pending += predecessors[number]
    return body


def _is_spin_loop(program: Program, indices: tuple[int, ...]) -> bool:
    opcodes = {program.instructions[index].opcode for index in indices}
    only_waits = bool(opcodes & _WAITS) and len(indices) <= _SPIN_LOOP_LENGTH
    return only_waits or opcodes <= {"BRA", "NOP"}
