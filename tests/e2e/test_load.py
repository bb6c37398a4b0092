"""Files and state dicts are not trusted: compiled code reads memory by the sizes that they state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcompile import QCError, QCWarning, convert, load, save

Tensors, Entry = dict[str, Tensor], dict[str, Any]
CODES, SCALES = (f"0.parametrizations.weight.original{index}" for index in (0, 1))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    source = model()
    convert(source, "int8/axis0:fp32")
    return save(source, tmp_path_factory.mktemp("saved"))


def damaged(saved: Path, folder: Path, tensors: Callable[[Tensors], Any], entry: Callable[[Entry], Any]) -> Path:
    content = load_file(saved / "model.safetensors")
    tensors(content)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / "model.safetensors")
    manifest = json.loads((saved / "qcompile.json").read_text())
    entry(manifest["weights"]["0"])
    (folder / "qcompile.json").write_text(json.dumps(manifest))
    return folder


def same(_: dict[str, Any]) -> None:
    """Nothing is wrong here."""


def put(**values: Any) -> Callable[[Entry], Any]:
    return lambda entry: entry.update(values)


BROKEN: dict[str, tuple[Callable[[Tensors], Any], Callable[[Entry], Any], str, str]] = {
    "more rows": (same, put(n=128000), "load.shape", "0.weight"),
    "more columns": (same, put(k=128), "load.shape", "0.weight"),
    "a float size": (same, put(n=48.0), "load.manifest", "'n'"),
    "no size": (same, lambda entry: entry.pop("k"), "load.manifest", "'k'"),
    "no scheme": (same, lambda entry: entry.pop("scheme"), "load.manifest", "'scheme'"),
    "another scheme": (same, put(scheme="uint4/g32:fp16+m"), "load.missing", "original2"),
    "another width": (same, put(scheme="int4/axis0:fp32"), "packing.shape", "codes"),
    "other scales": (same, put(scheme="int8/g32:fp32"), "packing.shape", "scales"),
    "an unknown scheme": (same, put(scheme="int9/axis0"), "scheme.unknown-format", "int9"),
    "a dtype that is a function": (same, put(dtype="load"), "load.manifest", "'load'"),
    "an unknown fit": (same, put(fit="best"), "load.manifest", "'best'"),
    "transposed": (same, put(transposed=True), "load.module", "Linear"),
    "codes cut": (lambda t: t.update({CODES: t[CODES][:1]}), same, "packing.shape", "codes"),
    "scales cut": (lambda t: t.update({SCALES: t[SCALES][:1]}), same, "packing.shape", "scales"),
    "scales in another dtype": (lambda t: t.update({SCALES: t[SCALES].half()}), same, "packing.shape", "float16"),
    "scales missing": (lambda t: t.pop(SCALES), same, "load.missing", "original1"),
    "one tensor more": (lambda t: t.update({"0.extra": t[CODES].clone()}), same, "load.surplus", "0.extra"),
    "another float dtype": (lambda t: t.update({"1.bias": t["1.bias"].bfloat16()}), same, "load.dtype", "1.bias"),
    "a packed weight of another dtype": (same, put(dtype="bfloat16"), "load.dtype", "0.weight"),
    "integers for floats": (lambda t: t.update({"1.bias": t["1.bias"].int()}), same, "load.dtype", "1.bias"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    tensors, entry, code, text = BROKEN[name]
    target = model()
    before = dict(target.state_dict())
    with pytest.raises(QCError, match=text) as caught:
        load(target, damaged(saved, tmp_path, tensors, entry))
    assert caught.value.code == code, str(caught.value)
    after = target.state_dict()
    assert before.keys() == after.keys(), "half loaded"
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["model.safetensors", "qcompile.json"])
@pytest.mark.parametrize("content", [b"", b"half", b"\xff"])
def test_half_a_file_is_called_damaged(name: str, content: bytes, saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path, same, same)
    half = (tmp_path / name).read_bytes()[:-100] if content == b"half" else content
    (tmp_path / name).write_bytes(half)
    with pytest.raises(QCError, match="damaged: save or copy") as caught:
        load(model(), tmp_path)
    assert (caught.value.code, caught.value.where) == ("load.path", str(tmp_path / name))


def test_a_model_in_another_dtype_is_refused(saved: Path) -> None:
    """On the meta device as well, where changing it costs nothing; the packed weights alone would fit."""
    with torch.device("meta"):
        empty = model()
    for target in (model(), empty):
        target.bfloat16()
        before = dict(target.state_dict())
        with pytest.raises(
            QCError, match=r"build the model in torch\.float32 .*\.to\(torch\.bfloat16\) after load"
        ) as caught:
            load(target, saved)
        assert (caught.value.code, caught.value.where) == ("load.dtype", "0.weight")
        after = target.state_dict()
        assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(before, torch.bfloat16)
        x = torch.randn(2, 64)
        assert load(target.float(), saved).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["weights", "aliases"])
def test_a_manifest_without_a_table(key: str, saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path, same, same)
    manifest = json.loads((tmp_path / "qcompile.json").read_text())
    del manifest[key]
    (tmp_path / "qcompile.json").write_text(json.dumps(manifest))
    with pytest.raises(QCError, match=key) as caught:
        load(model(), tmp_path)
    assert caught.value.code == "load.manifest"


def test_files_of_before_there_were_fits(saved: Path, tmp_path: Path) -> None:
    target = load(model(), damaged(saved, tmp_path, same, lambda entry: entry.pop("fit")))
    assert torch.equal(target[0].weight, load(model(), saved)[0].weight)


@pytest.mark.parametrize(
    ("target", "code"),
    [
        (nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(48)), "load.shape"),
        (nn.Sequential(nn.Embedding(10, 64), nn.LayerNorm(48)), "load.shape"),
        (nn.Sequential(nn.Linear(64, 48)), "load.surplus"),
        (nn.Sequential(nn.LayerNorm(48), nn.ReLU()), "load.shape"),
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(48)), "load.module"),
    ],
)
def test_another_architecture_is_refused(saved: Path, target: nn.Module, code: str) -> None:
    with pytest.raises(QCError) as caught:
        load(target, saved)
    assert caught.value.code == code, str(caught.value)


@pytest.mark.parametrize(("shape", "scheme"), [((64, 48), "e4m3/axis0:fp32"), ((60, 48), "int8/axis0:fp32")])
def test_a_state_dict_of_another_meaning_is_refused(shape: tuple[int, int], scheme: str) -> None:
    """All its tensors have the right shapes and dtypes: panels are padded, and bytes are bytes."""
    source, target = nn.Sequential(nn.Linear(64, 48, bias=False)), nn.Sequential(nn.Linear(*shape, bias=False))
    convert(source, "int8/axis0:fp32")
    convert(target, scheme)
    assert [b.shape for b in source.buffers()] == [b.shape for b in target.buffers()]
    before = [b.clone() for b in target.buffers()]
    with pytest.raises(QCError, match=r"int8/axis0:fp32 \[48, 64\]") as caught:
        target.load_state_dict(source.state_dict())
    assert caught.value.code == "load.scheme"
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), before, strict=True))


@pytest.mark.parametrize("path", ["", "0."])
def test_a_float_state_dict_is_told_when_to_load(path: str) -> None:
    target, source = nn.Linear(64, 48), nn.Linear(64, 48)
    whole = target if not path else nn.Sequential(target)
    convert(whole, "int8")
    state = {f"{path}{name}": tensor for name, tensor in source.state_dict().items()}
    before, told = target.weight, r"not loaded: call load_state_dict before qcompile\.convert"
    with (
        pytest.raises(RuntimeError, match=rf'Unexpected .*"{path}weight"'),
        pytest.warns(QCWarning, match=told) as caught,
    ):
        whole.load_state_dict(state)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(QCWarning, match=told):  # torch says nothing here
        whole.load_state_dict(state, strict=False)
    assert torch.equal(target.bias, source.bias)
    assert torch.equal(target.weight, before)


def test_a_state_dict_is_plain_tensors(tmp_path: Path) -> None:
    """Any format that keeps tensors keeps it."""
    source, target = model(), model()
    for item in (source, target):
        convert(item, "uint4/g32:fp16+m")
    save_file(source.state_dict(), tmp_path / "state.safetensors")
    torch.save(source.state_dict(), tmp_path / "state.pt")
    for state in (load_file(tmp_path / "state.safetensors"), torch.load(tmp_path / "state.pt", weights_only=True)):
        target[0].weight = torch.zeros(48, 64)
        target.load_state_dict(state)
        assert torch.equal(target[0].weight, source[0].weight)


def test_a_tied_tensor_without_a_place(tmp_path: Path) -> None:
    source = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    source[1].weight = source[0].weight
    with pytest.warns(QCWarning, match="no weight of this model is packed"):
        save(source, tmp_path)
    load(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8)), tmp_path)
    with pytest.raises(QCError, match=r"1\.bias, 1\.weight"):
        load(nn.Sequential(nn.LayerNorm(8)), tmp_path)
