"""Machine code and source, read: the text of a disassembler becomes counts, and a place becomes a pointer's name."""

from __future__ import annotations

import re

import pytest

from qcompile.testing.sass import Instruction, count, loops, main_loop, parse_amdgcn, parse_sass, unwaited, width
from qcompile.testing.source import pointers_of


def sass(*lines: str) -> str:
    """The text of a disassembler: `label:` or an instruction for each line."""
    return "\n".join(line if line.endswith(":") else f"        /*{i:04x}*/  {line} ;" for i, line in enumerate(lines))


def opcodes(found: tuple[Instruction, ...]) -> list[str]:
    return [instruction.opcode for instruction in found]


def test_the_innermost_loop_with_matrix_instructions() -> None:
    code = parse_sass(
        sass(
            *("MOV R0, R1", ".L_x_0:", "LDG.E R2, [R0]", ".L_x_1:", "LDG.E.128 R4, [R0]", "HMMA.16816.F32 R8, R4"),
            *("@!P0 BRA `(.L_x_1)", ".L_x_2:", "LDG.E.64 R4, [R0]", "@P1 BRA `(.L_x_2)", "@P2 BRA `(.L_x_0)"),
            *("EXIT", ".L_x_3:", "BRA `(.L_x_3)", "NOP"),
        )
    )
    assert sorted(map(len, loops(code))) == [1, 2, 3, 7]
    assert opcodes(main_loop(code)) == ["LDG.E.128", "HMMA.16816.F32", "BRA"]


def test_without_matrix_instructions_the_innermost_loop_with_loads() -> None:
    lines = ".L_x_0:; LDG.E R2, [R0]; .L_x_1:; FADD R4, R4; @!P0 BRA `(.L_x_1); @P2 BRA `(.L_x_0); EXIT".split("; ")
    assert opcodes(main_loop(parse_sass(sass(*lines)))) == ["LDG.E", "FADD", "BRA", "BRA"]
    assert main_loop(parse_sass(sass("LDG.E R2, [R0]", "EXIT"))) == ()


def test_code_out_of_line_belongs_to_its_loop() -> None:
    """A wait that is moved behind the kernel's end and jumps back, and conditions written as operands."""
    code = parse_sass(
        sass(
            *(".L_x_0:", "SYNCS.PHASECHK P0, [UR4]", "@!P0 BRA `(.L_x_2)", ".L_x_1:", "UTCHMMA gdesc[UR6]"),
            *("BRA.U UP0, `(.L_x_0)", "STG.E [R0], R1", "EXIT"),
            *(".L_x_2:", "SYNCS.WAIT P0, [UR4]", "@!P0 BRA `(.L_x_2)", "BRA `(.L_x_1)"),
        )
    )
    assert opcodes(main_loop(code)) == ["SYNCS.PHASECHK", "BRA", "UTCHMMA", "BRA.U", "SYNCS.WAIT", "BRA", "BRA"]


def test_jumps_to_nobody_knows_where() -> None:
    """Code that only an unknown jump reaches has loops as well, and what merely leads to one is not in it."""
    lines = """BRX R2; .L_x_0:; LDG.E R2, [R0]; @P0 BRA `(.L_x_0); EXIT; LDG.E.64 R2, [R0]; @P1 BRA `(.L_x_1); MOV R0, R1;
        .L_x_1:; HMMA.1688 R4, R2; @P0 BRA `(.L_x_1); RET.REL.NODEC R2 `(k)"""
    code = parse_sass(sass(*map(str.strip, lines.split(";"))))
    assert opcodes(main_loop(code)) == ["HMMA.1688", "BRA"]


def test_what_is_never_executed_is_not_counted() -> None:
    counts = count(parse_sass(sass("@!PT LDS RZ, [RZ]", "@P0 LDS R0, [R1]", "@PT LDS.128 R0, [R1]")).instructions)
    assert counts.instructions == 3
    assert counts.shared == {"LDS": 2}


def test_kinds_of_instructions() -> None:
    lines = """LDSM.16.M88.4 R0; STSM.16.M88.4 [R0]; STS.U8 [R0]; LDC R1; LDTM.x128 R0; I2FP.F32.S32 R0; I2F.S8 R0; F2F R0
        QGMMA.64x64x32.F32 R0; IMMA.16832.S8.S8 R0; FMUL R0; UTMALDG.2D [UR0]; LDG.E.U16 R0; REDG.E.ADD.F32 [R0]; REDUX R1
        STL.64 [R1]; LDL.LU R0; BAR.SYNC 0; WARPGROUP.ARRIVE; WARPGROUP.DEPBAR gsb0; USETMAXREG 40; SHFL.BFLY R0"""
    counts = count(parse_sass(sass(*(line.strip() for line in re.split(r"[;\n]", lines)))).instructions)
    assert counts.shared == {"LDSM": 1, "STSM": 1, "STS": 1}
    assert counts.mma == {"QGMMA.64x64x32.F32": 1, "IMMA.16832.S8.S8": 1}
    assert counts.loads == {"UTMALDG.2D": 1, "LDG.E.U16": 1}
    assert counts.stores == {"REDG.E.ADD.F32": 1}
    assert (counts.i2f, counts.shuffles, counts.barriers, counts.arrives, counts.setmaxnreg) == (2, 1, 1, 1, 1)
    assert counts.spill_bytes == 8 + 4
    amd = """ds_read2st64_b64 v[0:3]; ds_write_b64 v0; ds_bpermute_b32 v0; v_add_f32_dpp v0; v_cvt_f32_ubyte0_e32 v0
        v_cvt_f32_i32_e32 v0; v_cvt_i32_f32_e32 v0; v_mfma_f32_16x16x16_f16 v0; v_mul_f32 v0; global_load_dwordx4 v0
        buffer_load_ushort v0; s_load_dwordx8 s[0:7]; scratch_store_dwordx2 v0; s_barrier; global_store_dword v0"""
    text = "\n".join("\t" + line.strip() for line in re.split(r"[;\n]", amd))
    counts = count(parse_amdgcn(text + "\n\t.p2align 8\n; a comment\n\ts_endpgm").instructions)
    assert counts.instructions == 16
    assert counts.shared == {"ds_read": 1, "ds_write": 1}
    assert counts.mma == {"v_mfma_f32_16x16x16_f16": 1}
    assert counts.loads == {"global_load_dwordx4": 1, "buffer_load_ushort": 1}
    assert (counts.i2f, counts.shuffles, counts.barriers, counts.spill_bytes) == (2, 2, 1, 8)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        *(("LDG.E", 4), ("LDG.E.EF.128", 16), ("LDG.E.U8.CONSTANT", 1), ("LDGSTS.E.BYPASS.LTC128B.64", 8)),
        *(("LDG.E.ENL2.256", 32), ("UTMALDG.2D", 0), ("global_load_dwordx3", 12), ("global_load_ushort", 2)),
        *(("buffer_load_dword", 4), ("global_load_short_d16_hi", 2), ("global_load_b128", 16), ("s_load_dwordx16", 64)),
    ],
)
def test_widths(opcode: str, expected: int) -> None:
    assert width(opcode) == expected


def test_whose_load_it_is() -> None:
    source = (
        "    def k(a, b, c, n):\n"
        "        p, i = a + n, tl.load(b)\n"
        "        for j in range(4):\n"
        "            p += j\n"
        "        x = tl.load(p + i,\n"
        "                    mask=c)\n"
        "        y = helper(x, b)\n"
        "        tl.dot(tl.load(a), tl.load(b + tl.load(c)))\n"
        "        q, r = p, b + p\n"
        "        tl.dot(tl.load(q), tl.load(r))\n"
    )
    named = pointers_of("k.py", 10, source, ["a", "b", "c"])
    assert named(("k.py", 14, 21)) == "a"  # through an assignment; what was loaded from b is no address
    assert named(("k.py", 15, 25)) == "a"  # the mask is on a line of its own
    assert named(("k.py", 16, 18)) == "b"
    assert [named(("k.py", 17, column)) for column in (20, 32, 45)] == ["a", "b", "c"]
    assert named(("k.py", 19, 20)) == "a"
    assert named(("k.py", 19, 32)) == "a, b"
    assert named(("k.py", 18, 0)) == named(("other.py", 14, 21)) == named(None) == ""


WAITS = """S2R R0, SR_CTAID.X; CCTL.E.PF2 [R2]; @P0 BRA `(.L_x_1); ACQBULK; PREEXIT; LDG.E R4, [R2]; @P1 EXIT;
    STG.E [R2], R4; EXIT; .L_x_1:; {0}; EXIT"""


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ("ACQBULK", []),
        ("MOV R1, R2", ["EXIT"]),
        ("@P2 ACQBULK", ["EXIT"]),
        ("LDGSTS.E.128 [R4], [R2]", ["LDGSTS.E.128", "EXIT"]),
        ("PREEXIT", ["PREEXIT", "EXIT"]),
        ("BRX R2", []),
    ],
)
def test_what_is_reached_before_the_wait(there: str, found: list[str]) -> None:
    """On some way: here where a branch leads past the wait. A prefetch harms nobody, a wait that may be left out is none."""
    code = parse_sass(sass(*map(str.strip, WAITS.format(there).split(";"))))
    assert opcodes(unwaited(code)) == found
    counts = count(code.instructions)
    assert (counts.waits, counts.releases) == (1 + there.count("ACQBULK"), 1 + there.count("PREEXIT"))
    assert counts.prefetches == 1
