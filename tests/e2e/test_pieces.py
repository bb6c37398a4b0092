"""Results of merged matmuls behave like the tensors that separate matmuls return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.backend import watching
from tests.e2e.support import compiled, decoded, planned


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Views(Two):
    """Views that need contiguous rows, inside the graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x).view(2, -1), self.b(x).view(-1)


class Writes(Two):
    """In-place work on one of the results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(x)
        a.add_(1)
        return a, b


def test_results_are_contiguous_and_own_their_memory() -> None:
    model, x = Two().eval(), torch.randn(2, 4, 32)
    for run in (lambda: planned(model, x), lambda: compiled(model)(x)):
        with torch.inference_mode():
            a, b = run()
        assert (a.stride(), b.stride()) == ((64, 16, 1), (96, 24, 1))
        a.view(-1)
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
        assert a.untyped_storage().nbytes() == a.numel() * 4


def test_views_of_results() -> None:
    model, x = Views().eval(), torch.randn(2, 4, 32)
    for got, want in zip(planned(model, x), decoded(model)(x), strict=True):
        assert torch.equal(got, want)


def test_a_result_may_be_written_while_autograd_records() -> None:
    model, x = Writes().eval().requires_grad_(False), torch.randn(3, 32, requires_grad=True)
    with watching("reference"):
        a, b = compiled(model)(x)
    (a.sum() + b.sum()).backward()
    assert x.grad is not None
    torch.compiler.reset()


def test_copies_inside_the_graph_are_dropped(tmp_path) -> None:  # type: ignore[no-untyped-def]
    class Gate(Two):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return torch.cat((self.a(x).relu(), self.b(x)), -1)

    with torch.inference_mode():
        compiled(Gate().eval(), dump=tmp_path)(torch.randn(3, 32))
    late = "".join(path.read_text() for path in tmp_path.glob("*_post/*epilogue*"))
    assert "qmm" in late
    assert "aten.clone" not in late
