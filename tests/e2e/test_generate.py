"""Generation with `transformers`: prompt and single tokens, caches that grow and caches of a fixed size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.backend import watching
from tests.e2e.support import compiled, decoded, fp32_step, noise_bound

STEP = fp32_step(96)


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(llama: Any, cache: str) -> None:
    """The same tokens as plain torch with the decoded weights (greedy; the logits' gaps are far above rounding)."""
    prompt = torch.tensor([[1, 5, 9, 11, 3]])
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    plain = decoded(llama)
    want = plain.generate(prompt, **settings)
    logits = plain(want).logits[0, 4:-1].topk(2).values
    model = copy.deepcopy(llama)
    assert (logits[:, 0] - logits[:, 1]).min() > 2 * noise_bound(Logits(plain), want, step=STEP), (
        "a tie: choose another prompt"
    )
    with watching("reference" if cache == "dynamic" else "compiled") as trace:
        model.forward = compiled(model.forward)
        got = model.generate(prompt, **settings)
    assert got.tolist() == want.tolist()
    assert trace.contexts
    assert all(
        d.quantized for ctx in trace.contexts for d in ctx.plan if d.site.kind in ("linear", "head", "embedding")
    )
