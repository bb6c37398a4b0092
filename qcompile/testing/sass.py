"""Machine code, read: which instructions a kernel has, where its loops are, and what is in its main loop.

The text of a disassembler says more about a kernel's speed than any source does: a load of 2 bytes where 16 were meant,
a conversion by the slow unit, an operand that takes the way through shared memory, registers that spill. All of this
can be counted without a device. Two dialects are read: NVIDIA's SASS as `nvdisasm -c -gi` prints it, and the assembly
that LLVM writes for AMD (AMDGCN). Loops are natural loops of the control-flow graph, so code that the assembler moved
out of line counts where it is executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Place = tuple[str, int]  # a file's name without folders, and a line


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with modifiers, where it may continue, and the source line it came from.

    `targets` are the labels it may jump to; `falls` says whether the next instruction may follow; `place` is the line
    in the outermost function (that of the kernel, where helpers are inlined), or None when the compiler kept none.
    """

    opcode: str
    targets: tuple[str, ...] = ()
    falls: bool = True
    place: Place | None = None


@dataclass(frozen=True)
class Code:
    """Instructions in the order of the text, and the positions of the labels among them."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Counts:
    """How often things occur in a piece of machine code: each instruction once, however often it runs.

    Attributes:
        instructions: all of them, without the padding. Each is issued once per warp.
        mma: matrix instructions by opcode, the shape included (`HMMA.16816.F32`, `v_mfma_f32_32x32x8_f16`).
        loads: loads from global memory by opcode: registers (LDG), asynchronous to shared memory (LDGSTS), TMA
            (UTMALDG), global_load and buffer_load on AMD. `width` gives the bytes per thread.
        operands: the same loads by the kernel's pointer arguments; `"a, b"` where one line loads from both, `""` where
            the compiler kept no line.
        stores: stores and atomics to global memory by opcode.
        shared: shared-memory instructions by family: LDS, STS, LDSM, STSM; ds_read, ds_write on AMD.
        shuffles: exchanges between the lanes of a warp (SHFL; permutes and DPP moves on AMD).
        i2f: conversions from integers to floats (I2F, which is slow, and I2FP).
        arrives: WARPGROUP.ARRIVE: more than one per dot means that the assembler serialised them.
        setmaxnreg: USETMAXREG: registers are moved between specialised warps.
        barriers: BAR (s_barrier on AMD).
        spill_bytes: bytes per thread that loads and stores of spilled registers move.
    """

    instructions: int = 0
    mma: Mapping[str, int] = field(default_factory=dict)
    loads: Mapping[str, int] = field(default_factory=dict)
    operands: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    stores: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)
    shuffles: int = 0
    i2f: int = 0
    arrives: int = 0
    setmaxnreg: int = 0
    barriers: int = 0
    spill_bytes: int = 0

    @property
    def widest(self) -> int:
        """Bytes per thread of the widest load from global memory; 0 without one, and TMA counts as 0."""
        return max(map(width, self.loads), default=0)

    def widest_of(self, operand: str) -> int:
        """Bytes per thread of the widest load of one pointer argument; 0 when no load could be attributed to it."""
        return max(map(width, self.operands.get(operand, {})), default=0)



def _starts(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


# What an opcode is, by its start. One table for both dialects: SASS is in capitals, AMDGCN is not.
_KINDS: Mapping[str, re.Pattern[str]] = {
    "mma": _starts(r"[A-Z]G?MMA\b", r"UTC[A-Z]*MMA\b", r"v_s?mfmac?_"),
    "loads": _starts(r"LDG\b", r"LDGSTS\b", r"LD\b", r"UTMALDG\b", r"UBLKCP\b", r"(?:global|buffer|flat)_load_"),
    "stores": _starts(
        *(r"STG\b", r"ST\b", r"UTMASTG\b", r"UTMAREDG\b", r"REDG?\b", r"ATOMG?\b"),
        r"(?:global|buffer|flat)_(?:store|atomic)_",
    ),
    "shared": _starts(r"(?:LDS|STS)M?\b", r"ds_(?:read|write|load|store)"),
    "shuffles": _starts(r"SHFL\b", r"ds_b?permute", r"ds_swizzle", r"v_permlane", r"v_\w+_dpp\b"),
    "i2f": _starts(r"I2FP?\b", r"v_cvt_(?:f\d+|bf16)_[iu]\d", r"v_cvt_f32_ubyte"),
    "arrives": _starts(r"WARPGROUP\.ARRIVE\b"),
    "setmaxnreg": _starts(r"USETMAXREG\b"),
    "barriers": _starts(r"BAR\b", r"s_barrier"),
    "spills": _starts(r"(?:STL|LDL)\b", r"scratch_(?:load|store)_"),
}
_WIDTHS = {
    **{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32},  # modifiers of SASS; 4 without one
    **{"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "byte": 1},
    **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
    **{"b32": 4, "b64": 8, "b96": 12, "b128": 16},
}


def width(opcode: str) -> int:
    """Bytes that one thread moves with a load or store; 0 for TMA, whose size is in a descriptor."""
    if opcode.startswith("U"):
        return 0
    return next((_WIDTHS[part] for part in reversed(re.split(r"[._]", opcode)) if part in _WIDTHS), 4)


def parse_sass(text: str) -> Code:
    """Read what `nvdisasm -c -gi` prints. Padding (NOP) is left out."""
    reader = _Reader()
    for line in text.splitlines():
        if found := _PLACE.search(line):
            reader.place = (found[1].rpartition("/")[2], int(found[2]))  # of several, the outermost comes last
        elif found := _LABEL.match(line):
            reader.label(found[1])
        elif (found := _SASS.match(line)) and found[2] != "NOP":
            guard, opcode, operands = found.groups()
            reader.add(opcode, operands, conditional=bool(guard) or re.match(r"!?U?[PR]", operands) is not None)
    return reader.code()


def parse_amdgcn(text: str) -> Code:
    """Read the assembly that LLVM writes for an AMD target; data and directives around the code are left out."""
    reader = _Reader()
    for line in text.splitlines():
        if line.startswith("\t.loc"):
            places = re.findall(r"([^\s:@\[]+):(\d+):\d+", line.partition(";")[2])
            reader.place = (places[-1][0], int(places[-1][1])) if places else None
        elif found := _LABEL.match(line):
            reader.label(found[1])
        elif found := _AMD.match(line):
            opcode, operands = found.groups()
            reader.add(opcode, operands, conditional=opcode.startswith("s_cbranch"))
    return reader.code()


_PLACE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)\b(?! inlined)')
_LABEL = re.compile(r"^(\.L\w+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@(?!U?PT\b)(!?\w+)\s+)?(?:@!?U?PT\s+)?([A-Z][\w.]*)\s*(.*)")
_AMD = re.compile(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)(?:\s+([^;]*))?")
_JUMPS = re.compile(r"(?:BRA|BRX|JMP|JMX|s_branch|s_cbranch_\w+)(?:\.|$)")
_ENDS = re.compile(r"(?:EXIT|RET|KILL|s_endpgm|s_setpc_b64)(?:\.|$)")


class _Reader:
    def __init__(self) -> None:
        self.place: Place | None = None
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        self.labels[name] = len(self.instructions)

    def add(self, opcode: str, operands: str | None, *, conditional: bool) -> None:
        jumps, ends = _JUMPS.match(opcode) is not None, _ENDS.match(opcode) is not None
        targets = tuple(re.findall(r"\.L\w+", operands or "")) if jumps else ()
        falls = conditional if jumps or ends else True
        self.instructions.append(Instruction(opcode, targets, falls, self.place))

    def code(self) -> Code:
        return Code(tuple(self.instructions), self.labels)


def count(instructions: Iterable[Instruction], pointers: Mapping[Place, str] | None = None) -> Counts:
    """Count instructions by kind. `pointers` names the pointer arguments that the loads of a source line read."""
    total = spilled = 0
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS}
    operands: dict[str, Counter[str]] = {}
    for instruction in instructions:
        total += 1
        opcode = instruction.opcode
        kind = next((kind for kind, pattern in _KINDS.items() if pattern.match(opcode)), None)
        if kind is None:
            continue
        key = re.split(r"2?[._]|2st64", opcode)[0] if kind == "shared" and opcode.isupper() else opcode
        kinds[kind][key] += 1
        if kind == "loads":
            name = (pointers or {}).get(instruction.place, "") if instruction.place else ""
            operands.setdefault(name, Counter())[opcode] += 1
        spilled += width(opcode) if kind == "spills" else 0
    return Counts(
        instructions=total,
        **{kind: dict(kinds[kind]) for kind in ("mma", "loads", "stores")},
        operands={name: dict(found) for name, found in operands.items()},
        shared=_families(kinds["shared"]),
        **{k: kinds[k].total() for k in ("shuffles", "i2f", "arrives", "setmaxnreg", "barriers")},
        spill_bytes=spilled,
    )


def _families(opcodes: Mapping[str, int]) -> dict[str, int]:
    families: Counter[str] = Counter()
    for opcode, number in opcodes.items():
        found = re.match(r"ds_[a-z]+|[A-Z]+", opcode)
        families[found[0] if found else opcode] += number
    return dict(families)


def main_loop(code: Code) -> tuple[Instruction, ...]:
    """The instructions of the loop that does the work, in the order of the text; empty when there is none.

    It is the innermost loop with matrix instructions, or else with loads from global memory: of several, the one
    with most of them, then the longest.
    """
    bodies = loops(code)
    for kind in ("mma", "loads"):
        scored = [(sum(_KINDS[kind].match(code.instructions[i].opcode) is not None for i in b), len(b), b) for b in bodies]
        working = [entry for entry in scored if entry[0]]
        inner = [entry for entry in working if not any(other[2] < entry[2] for other in working)]
        if inner:
            body = max(inner, key=lambda entry: entry[:2])[2]
            return tuple(code.instructions[i] for i in sorted(body))
    return ()


def loops(code: Code) -> list[frozenset[int]]:
    """The natural loops of the control-flow graph, each as the positions of its instructions.

    Jumps whose targets the text does not tell (BRX) are taken to reach whatever nothing else reaches.
    """
    blocks, successors = _blocks(code)
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        for target in following:
            predecessors[target].append(block)
    found: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if not dominators[block] >> head & 1:
                continue
            body = found.setdefault(head, {head})
            pending = [block]
            while pending:
                at = pending.pop()
                if at not in body:
                    body.add(at)
                    pending += predecessors[at]
    return [frozenset(i for block in body for i in blocks[block]) for body in found.values()]


def _blocks(code: Code) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, and the blocks that may follow each."""
    size = len(code.instructions)
    starts = {0, *(at for at in code.labels.values() if at < size)}
    starts |= {i + 1 for i, it in enumerate(code.instructions[:-1]) if it.targets or not it.falls}
    ordered = sorted(starts) if size else []
    blocks = [range(a, b) for a, b in zip(ordered, [*ordered[1:], size], strict=True)] if size else []
    number = {block.start: i for i, block in enumerate(blocks)}
    successors = []
    for i, block in enumerate(blocks):
        last = code.instructions[block[-1]]
        jumps = {number[at] for t in last.targets if (at := code.labels.get(t, size)) < size}
        successors.append(sorted(jumps | ({i + 1} if last.falls and i + 1 < len(blocks) else set())))
    return blocks, successors


def _dominators(successors: Sequence[Sequence[int]]) -> list[int]:
    """For every block the set of blocks on all ways to it, as bits."""
    order: list[int] = []
    roots: set[int] = set()
    seen: set[int] = set()
    for root in range(len(successors)):  # the first block; then whatever was not reached, in the order of the text
        if root in seen:
            continue
        roots.add(root)
        seen.add(root)
        post, stack = [], [(root, iter(successors[root]))]
        while stack:
            block, following = stack[-1]
            step = next((target for target in following if target not in seen), None)
            if step is None:
                post.append(block)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(successors[step])))
        order += reversed(post)
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)
    everything = (1 << len(successors)) - 1
    dominators = [1 << block if block in roots else everything for block in range(len(successors))]
    changed = True
    while changed:
        changed = False
        for block in order:
            if block in roots:
                continue
            common = everything
            for before in predecessors[block]:
                common &= dominators[before]
            new = common | 1 << block
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators
