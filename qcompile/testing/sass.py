"""Machine code, read: which instructions a kernel has, where its loops are, and what is in its main loop.

The text of a disassembler says more about a kernel's speed than any source does: a load of 2 bytes where 16 were meant,
a conversion by the slow unit, an operand that takes the way through shared memory, registers that spill. All of this
can be counted without a device. Two dialects are read: NVIDIA's SASS as `nvdisasm -c -gp` prints it, and the assembly
that LLVM writes for AMD (AMDGCN). Loops are natural loops of the control-flow graph, so code that the assembler moved
out of line counts where it is executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Place = tuple[str, int, int]  # a file's name without folders, a line, and a column, from 0


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with modifiers, where it may continue, and the place in the source it came from.

    `targets` are the labels it may jump to; `falls` says whether the next instruction may follow; `never` that it is
    there to be issued only (`@!PT LDS`, which waits for something); `guarded` that a predicate decides
    whether it runs; `place` is in the outermost function (the kernel's, where helpers are inlined), or None when the
    compiler kept none.
    """

    opcode: str
    targets: tuple[str, ...] = ()
    falls: bool = True
    never: bool = False
    guarded: bool = False
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
        mma: matrix instructions by opcode, the shape included (`HMMA.16816.F32`, `UTCHMMA.128x128x16`,
            `v_mfma_f32_32x32x8_f16`).
        loads: loads from global memory by opcode: registers (LDG), asynchronous to shared memory (LDGSTS), TMA
            (UTMALDG), global_load and buffer_load on AMD, and s_load, one for all lanes, where it loads an operand. `width`
            gives the bytes per thread.
        operands: the same loads by the kernel's pointer arguments; `"a, b"` where an address is made of both, `""`
            where the compiler did not keep the place.
        stores: stores and atomics to global memory by opcode.
        shared: shared-memory instructions by family: LDS, STS, LDSM, STSM; ds_read, ds_write on AMD.
        shuffles: exchanges between the lanes of a warp (SHFL; permutes and DPP moves on AMD).
        i2f: conversions from integers to floats (I2F, which is slow, and I2FP).
        arrives: WARPGROUP.ARRIVE: more than one per dot means that the assembler serialised them.
        setmaxnreg: USETMAXREG: registers are moved between specialised warps.
        barriers: BAR (s_barrier on AMD).
        waits: ACQBULK, PTX's griddepcontrol.wait: for the kernel before this one to have ended.
        releases: PREEXIT, PTX's griddepcontrol.launch_dependents: the next kernel may begin.
        prefetches: CCTL...PF: of memory into a cache.
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
    waits: int = 0
    releases: int = 0
    prefetches: int = 0
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
    "waits": _starts(r"ACQBULK\b"),
    "releases": _starts(r"PREEXIT\b"),
    "prefetches": _starts(r"CCTL\S*\.PF"),
    "spills": _starts(r"(?:STL|LDL)\b", r"scratch_(?:load|store)_"),
}
# Bytes by the last part of an opcode that tells: of SASS (4 when none does), then of AMDGCN.
_WIDTHS = {
    **dict.fromkeys(("U8", "S8", "ubyte", "sbyte", "byte"), 1),
    **dict.fromkeys(("U16", "S16", "ushort", "sshort", "short"), 2),
    **dict.fromkeys(("64", "dwordx2", "b64"), 8),
    **dict.fromkeys(("dwordx3", "b96"), 12),
    **dict.fromkeys(("128", "dwordx4", "b128"), 16),
    **dict.fromkeys(("256", "dwordx8"), 32),
    **dict.fromkeys(("dwordx16",), 64),
}


def width(opcode: str) -> int:
    """Bytes that one thread moves with a load or store; 0 for TMA, whose size is in a descriptor."""
    if opcode.startswith("U"):
        return 0
    return next((_WIDTHS[part] for part in reversed(re.split(r"[._]", opcode)) if part in _WIDTHS), 4)


def parse_sass(text: str, ptx: str = "") -> Code:
    """Read what `nvdisasm -c -gp` prints, which names the line of the PTX that each instruction came from; the PTX in
    turn names the place in the source, and the shapes of tcgen05. Padding (NOP) is left out."""
    places, shapes, shape = _places_of_ptx(ptx), _shapes_of_ptx(ptx), ""
    reader = _Reader()
    for line in text.splitlines():
        if found := _PTX_LINE.match(line):
            number = int(found[1])
            reader.place, shape = places.get(number), shapes.get(number, "")
        elif found := _LABEL.match(line):
            reader.label(found[1])
        elif (found := _SASS.match(line)) and found[2] != "NOP":
            guard, opcode, operands = found.groups()
            conditional = bool(guard) or re.match(r"!?U?[PR]\w*,", operands) is not None
            opcode += shape if re.fullmatch(r"UTC[A-Z]*MMA", opcode) else ""
            never = guard in ("!PT", "!UPT")
            reader.add(opcode, operands, conditional=conditional, never=never, guarded=bool(guard))
    return reader.code()


def parse_amdgcn(text: str) -> Code:
    """Read the assembly that LLVM writes for an AMD target; data and directives around the code are left out."""
    reader = _Reader()
    for line in text.splitlines():
        if line.startswith("\t.loc"):
            reader.place = _place(line.partition(";")[2])
        elif found := _LABEL.match(line):
            reader.label(found[1])
        elif found := _AMD.match(line):
            opcode, operands = found.groups()
            reader.add(opcode, operands, conditional=opcode.startswith("s_cbranch"))
    return reader.code()


def _places_of_ptx(ptx: str) -> dict[int, Place | None]:
    places, place = {}, None
    for number, line in enumerate(ptx.splitlines(), 1):
        if line.startswith("\t.loc"):
            place = _place(line.partition("//")[2])
        places[number] = place
    return places


def _shapes_of_ptx(ptx: str) -> dict[int, str]:
    """The shape MxNxK of every tcgen05.mma, by line, from its instruction descriptor (PTX ISA, "Instruction descriptor":
    N / 8 in bits 17-22, M / 16 in bits 24-28), a constant in a register; K is 32 bytes of the operands' kind."""
    known = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx)}
    shapes = {}
    for number, line in enumerate(ptx.splitlines(), 1):
        found = re.search(r"tcgen05\.mma\S*\.kind::(\w+)\s+\[[^]]*\], *(?:%\w+|\[[^]]*\]), *%\w+, *(%r\d+)", line)
        if found and found[1] in _K and found[2] in known:
            descriptor = known[found[2]]
            shapes[number] = f".{(descriptor >> 24 & 31) * 16}x{(descriptor >> 17 & 63) * 8}x{_K[found[1]]}"
    return shapes


_K = {"tf32": 8, "f16": 16, "i8": 32, "f8f6f4": 32}


def _place(comment: str) -> Place | None:
    """The outermost of `helper.py:3:4 @[ kernel.py:20:8 ]`: the place in the kernel itself."""
    found = re.findall(r"([^\s\[\]]+):(\d+):(\d+)", comment)
    return (found[-1][0], int(found[-1][1]), int(found[-1][2])) if found and int(found[-1][1]) else None


_PTX_LINE = re.compile(r'^\s*//## File "[^"]*nv_debug_ptx_txt[^"]*", line (\d+)')
_LABEL = re.compile(r"^(\.L\w+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@(?!U?PT\b)(!?\w+)\s+)?(?:@U?PT\s+)?([A-Z][\w.]*)\s*(.*)")
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

    def add(
        self, opcode: str, operands: str | None, *, conditional: bool, never: bool = False, guarded: bool = False
    ) -> None:
        jumps, ends = _JUMPS.match(opcode) is not None, _ENDS.match(opcode) is not None
        targets = tuple(re.findall(r"\.L\w+", operands or "")) if jumps else ()
        falls = conditional if jumps or ends else True
        self.instructions.append(Instruction(opcode, targets, falls, never, guarded, self.place))

    def code(self) -> Code:
        return Code(tuple(self.instructions), self.labels)


def count(instructions: Iterable[Instruction], pointers: Callable[[Place | None], str] = lambda _: "") -> Counts:
    """Count instructions by kind. `pointers` names the pointer arguments that a place in the source loads from."""
    total = 0
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS}
    operands: dict[str, Counter[str]] = {}
    for instruction in instructions:
        total += 1
        opcode, kind = instruction.opcode, _kind(instruction)
        if kind == "loads" or opcode.startswith("s_load_"):
            name = pointers(instruction.place)
            if kind != "loads" and not name:
                continue  # a scalar load of the kernel's own arguments
            operands.setdefault(name, Counter())[opcode] += 1
            kind = "loads"
        if kind is not None:
            kinds[kind][opcode] += 1
    return Counts(
        instructions=total,
        mma=dict(kinds["mma"]),
        loads=dict(kinds["loads"]),
        operands={name: dict(found) for name, found in sorted(operands.items())},
        stores=dict(kinds["stores"]),
        shared=_families(kinds["shared"]),
        shuffles=kinds["shuffles"].total(),
        i2f=kinds["i2f"].total(),
        arrives=kinds["arrives"].total(),
        setmaxnreg=kinds["setmaxnreg"].total(),
        barriers=kinds["barriers"].total(),
        waits=kinds["waits"].total(),
        releases=kinds["releases"].total(),
        prefetches=kinds["prefetches"].total(),
        spill_bytes=sum(width(opcode) * number for opcode, number in kinds["spills"].items()),
    )


def _kind(instruction: Instruction) -> str | None:
    if instruction.never:
        return None
    return next((kind for kind, pattern in _KINDS.items() if pattern.match(instruction.opcode)), None)


def _families(opcodes: Mapping[str, int]) -> dict[str, int]:
    families: Counter[str] = Counter()
    for opcode, number in opcodes.items():
        found = re.match(r"ds_[a-z]+|[A-Z]+", opcode)
        families[found[0] if found else opcode] += number
    return dict(families)


def unwaited(code: Code) -> tuple[Instruction, ...]:
    """What some way through a kernel reaches before it has waited for the kernel before it: loads and stores of global
    memory, the start of the next kernel, and exits. Nothing, for a kernel that may begin before that one has ended."""
    size, seen, left = len(code.instructions), set[int](), [0]
    while left:
        at = left.pop()
        if at >= size or at in seen:
            continue
        seen.add(at)
        one = code.instructions[at]
        if _kind(one) == "waits" and not one.guarded:
            continue
        left += [code.labels.get(target, size) for target in one.targets] + ([at + 1] if one.falls else [])
    found = (code.instructions[at] for at in sorted(seen))
    return tuple(one for one in found if _kind(one) in ("loads", "stores", "releases") or _ENDS.match(one.opcode))


def main_loop(code: Code) -> tuple[Instruction, ...]:
    """The instructions of the loop that does the work, in the order of the text; empty when there is none.

    It is the innermost loop with matrix instructions, or else with loads from global memory: of several, the one
    with most of them, then the longest.
    """
    bodies = loops(code)
    for kind in ("mma", "loads"):
        scored = [(sum(_kind(code.instructions[i]) == kind for i in body), len(body), body) for body in bodies]
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
