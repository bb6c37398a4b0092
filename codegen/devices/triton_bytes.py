"""The lines of kernels around a weight that was decoded to bytes: the decode itself, and a product that reads them.

A word of the `mma8` packing becomes, for each step, the 32-bit word of four neighbouring bytes that the fused kernel
multiplies; decoding writes these words where rows want them, so it knows nothing of what the bytes stand for.
"""

from __future__ import annotations

from qcompile.codegen.devices.triton_lines import Codes, Layout
from qcompile.codegen.devices.triton_numbers import Bytes, byte_operand
from qcompile.codegen.spec import KernelSpec


class Stored(Codes):
    """Bytes whose weight lies in rows, `[N of all segments, K padded to the unit]`: both operands come as they are."""

    @staticmethod
    def of(spec: KernelSpec) -> Stored:
        assert spec.act is not None
        layout = Layout.of(spec.weight, spec.act)
        return Stored(spec, layout, Bytes.of(spec.weight.format, byte_operand(spec.act)))

    def decode(self) -> list[str]:
        """The words of KC units to memory, 16 bytes at a time where columns of steps lie side by side."""
        steps = self.numbers.steps
        lines = [*self._codes("0"), *(f"w{step} = {self.numbers.word(step)}" for step in range(steps))]
        lines.append(f"w = {_joined(list(range(steps)))}")
        # From (unit, half, panel, row of 8, place of the word in 16 columns, word of the lane, step).
        lines.append(f"w = tl.reshape(w, (KC, 2, PANELS, 8, 4, 4, {steps}))")
        lines.append(f"w = tl.reshape(tl.permute(w, (2, 1, 3, 0, 5, 6, 4)), (BN, KC * {self.layout.unit // 4}))")
        lines.append(f"k = u * {self.layout.unit // 4} + tl.arange(0, KC * {self.layout.unit // 4})[None, :]")
        lines.append("tl.store(D + row + k, w, mask=(row_n < N)[:, None])")
        return lines

    def before(self) -> list[str]:
        """Where scales and sums of x lie that the loop reads."""
        layout = self.layout
        lines = [f"x_groups = tl.cdiv(K, {layout.act_group})"] if layout.act_group else []
        return lines + ([f"cells = tl.cdiv(K, {layout.cell})"] if layout.cell and self.corrected else [])

    def after(self) -> list[str]:
        """As in `Codes`; what only the end reads is loaded here."""
        lines = [] if self.layout.act_group else ["sx = for_rows(XS + m_at, 2 * BN)"]
        lines += ["xs = for_rows(XG + m_at, 2 * BN)"] if self.corrected and not self.layout.cell else []
        return lines + super().after()

    def loop(self) -> list[str]:
        """One iteration: BK columns, which lie in one cell."""
        layout, lines = self.layout, []
        if layout.cell and self.corrected:
            lines.append(f"xs = for_rows(XG + m_at * cells + k // {layout.cell}, 2 * BN)")
            # Iterations may share a cell, which has one sum.
            lines.append(f"xs = xs if BK == {layout.cell} else tl.where(k % {layout.cell} == 0, xs, 0)")
        if layout.act_group:
            lines.append(f"sx = for_rows(XS + m_at * x_groups + k // {layout.act_group}, 2 * BN)")
        lines.append("x = tl.trans(X.load([tile_m * BM, k])) if TMA else tl.load(x_at + k)")
        for i, acc in self.pairs:
            lines.append(f"w = D.load([{self.left_of[i]} + tile_n * BN, k]) if TMA else tl.load(w_at{i} + k)")
            lines.append(self._product_of(acc))
            if layout.cell:
                group = f"k // {layout.group}" if layout.group else ""
                scale = f" * ({self._scale(i, 's', group)})[:, None]" if group else ""
                lines.append(
                    f"{acc} += {self._number(i, 'p', group)}{scale}" + (" * sx[None, :]" if layout.act_group else "")
                )
        return lines

    @property
    def left_of(self) -> dict[str, str]:
        """By suffix of the operands' names: text of the first row of a segment among all of them."""
        return {name: f"{name} * N0" if self.spec.paired else "left" for name in self.names}

    def _product_of(self, acc: str) -> str:
        """As in `Codes`: integers are summed in the instruction's accumulator, e4m3 leaves it after BK columns."""
        if self.layout.cell:
            return f"p = tl.dot(w, x, out_dtype={self.dot})"
        dot = f"tl.dot(w, x, {acc}, out_dtype={self.dot})" if self.whole else f"tl.dot(w, x, out_dtype={self.dot})"
        return f"{acc} = {dot}" if self.whole else f"{acc} += {dot}"


def _joined(steps: list[int]) -> str:
    """Text of words with their steps in new last dimensions, which flattened are in order."""
    if len(steps) == 1:
        return f"w{steps[0]}"
    return f"tl.join({_joined(steps[::2])}, {_joined(steps[1::2])})"
