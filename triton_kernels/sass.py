"""Reading NVIDIA machine code (SASS): instruction counts, spills, the main loop, bytes in flight.

Weights are loaded with `eviction_policy="evict_first"`, which shows in SASS as `.EF`: that is how weight loads are told
from loads of activations here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);\s*/\*\s*0x[0-9a-f]+\s*\*/\s*$")
_CONTROL = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/\s*$")
_TARGET = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")


@dataclass(frozen=True)
class Instruction:
    """`text` without its predicate, its `opcode`, and two fields of its control word.

    `signals`: the scoreboard (0 to 5) that the result of a load will release, or None. `waits`: bit mask of the
    scoreboards that this instruction waits for.
    """

    text: str
    opcode: str
    signals: int | None
    waits: int

    @property
    def width(self) -> int:
        """Bytes per thread of a load or store."""
        for suffix, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if suffix in self.opcode:
                return size
        return 4

    @property
    def is_weight_load(self) -> bool:
        return self.opcode.startswith("LDG") and ".EF" in self.opcode


@dataclass(frozen=True)
class Sass:
    """A kernel's instructions in order, and its loops as `(first, last)` index pairs, inclusive."""

    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]

    @cached_property
    def main_loop(self) -> tuple[Instruction, ...]:
        """The loop that loads the most weight bytes per trip; without one, everything."""
        if not self.loops:
            return self.instructions
        first, last = max(self.loops, key=lambda loop: (weight_bytes(self.instructions[loop[0] : loop[1] + 1]), loop))
        return self.instructions[first : last + 1]

    def count(self, *prefixes: str) -> int:
        """Instructions of the whole kernel whose opcode starts with one of `prefixes`."""
        return _count(self.instructions, prefixes)

    def instructions_per_thread(self, weight_bytes_per_thread: float, *prefixes: str) -> float:
        """Instructions a thread executes: everything once, and the main loop until all its weights are loaded.

        Loops of a kernel that loads no weights, over the tokens for instance, count once: compared with the kernels
        that do, its work is small. With `prefixes`, only opcodes that start with one of them. An upper bound: both
        sides of a branch count, and so do peeled or remainder copies of the loop.
        """
        loop = self.main_loop
        trips = 1.0
        if loop is not self.instructions and weight_bytes_per_thread:
            per_trip = weight_bytes(loop)
            if not per_trip:
                raise ValueError("the main loop loads no weights with evict_first")
            trips = weight_bytes_per_thread / per_trip
        in_loop, whole = (_count(part, prefixes) for part in (loop, self.instructions))
        return whole - in_loop + in_loop * trips

    @cached_property
    def bytes_in_flight(self) -> int:
        """The most bytes of weights that one warp has requested and not yet waited for, in the main loop; of anything,
        where there are no weights.

        A load signals a scoreboard when its data arrives; until an instruction waits for that one it is in flight.
        """
        flying: dict[int, int] = {}
        most = 0
        no_weights = not weight_bytes(self.main_loop)
        for instruction in self.main_loop * 2:  # twice: loads may be awaited in the next trip
            flying = {board: size for board, size in flying.items() if not instruction.waits >> board & 1}
            counts = instruction.is_weight_load or (no_weights and instruction.opcode.startswith("LDG"))
            if counts and instruction.signals is not None:
                flying[instruction.signals] = flying.get(instruction.signals, 0) + 32 * instruction.width
                most = max(most, sum(flying.values()))
        return most


def parse(text: str) -> Sass:
    """Parse the output of `nvdisasm -c -hex`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            control = _CONTROL.match(lines[number + 1]) if number + 1 < len(lines) else None
            # Bits 105 to 125 of 128: stall 4, yield 1, write barrier 3, read barrier 3, wait mask 6, reuse 4.
            word = int(control[1], 16) >> 41 if control else 0
            signals = word >> 5 & 7
            plain = re.sub(r"^@!?U?P\w+\s+", "", match[1].strip())
            instructions.append(
                Instruction(plain, plain.split()[0], signals if signals < 6 and control else None, word >> 11 & 63)
            )
    while instructions and instructions[-1].opcode == "NOP":
        instructions.pop()
    loops = []
    for index, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.text)
        # The last instruction of every kernel branches to itself; that is a trap, no loop.
        if target and labels.get(target[1], index) < index:
            loops.append((labels[target[1]], index))
    return Sass(tuple(instructions), tuple(loops))


def weight_bytes(instructions: tuple[Instruction, ...]) -> int:
    """Bytes of weights a thread loads in one pass over `instructions`."""
    return sum(instruction.width for instruction in instructions if instruction.is_weight_load)


def _count(instructions: tuple[Instruction, ...], prefixes: tuple[str, ...]) -> int:
    if not prefixes:
        return len(instructions)
    return sum(instruction.opcode.startswith(prefixes) for instruction in instructions)
