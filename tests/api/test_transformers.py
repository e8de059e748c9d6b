"""Encoders and decoders in the style of Hugging Face, with random weights, against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from comparison import assert_close
from input_cases import Case, check
from torch import Tensor, nn

import fxcurv

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 3}
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 1, 2]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
IMAGES = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1])
CE = nn.CrossEntropyLoss()
NEXT = torch.tensor([[2, 3, -100], [5, -100, -100], [1, 2, 0]])


def bert(attention: str) -> nn.Module:
    """A classifier of sentences."""
    config = transformers.BertConfig(
        vocab_size=7, max_position_embeddings=4, type_vocab_size=2, num_labels=3, attn_implementation=attention, **SMALL
    )
    return transformers.BertForSequenceClassification(config)


def gpt2(attention: str, width: int = 4) -> nn.Module:
    """A language model with its output layer tied to its embedding."""
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=4,
        n_embd=width,
        n_layer=1,
        n_head=2,
        n_inner=3,
        use_cache=False,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2_classifier(attention: str) -> nn.Module:
    """A decoder that classifies by the last token which is not padding."""
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=4,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=3,
        use_cache=False,
        num_labels=3,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return transformers.GPT2ForSequenceClassification(config)


def t5() -> nn.Module:
    """An encoder and a decoder with relative positions."""
    config = transformers.T5Config(
        vocab_size=7,
        d_model=4,
        d_kv=2,
        d_ff=3,
        num_layers=1,
        num_heads=2,
        use_cache=False,
        decoder_start_token_id=0,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=3,
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit(attention: str) -> nn.Module:
    """A classifier of images."""
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, num_channels=1, num_labels=3, attn_implementation=attention, **SMALL
    )
    return transformers.ViTForImageClassification(config)


def llama(attention: str) -> nn.Module:
    """Rotary positions, grouped queries, RMSNorm and a gated MLP."""
    config = transformers.LlamaConfig(
        vocab_size=7,
        max_position_embeddings=8,
        num_key_value_heads=1,
        use_cache=False,
        attn_implementation=attention,
        **SMALL,
    )
    return transformers.LlamaForCausalLM(config)


def logits(returned: Any) -> Tensor:
    return returned.logits


def logits_second(returned: Any) -> Tensor:
    return returned.logits.transpose(1, 2)


WORDS = {"input_ids": TOKENS, "attention_mask": MASK}
FLOAT32 = 1e-5
"""The tolerance for models that normalise or take softmax in float32, whatever the type of their parameters."""
MODELS: dict[str, Case] = {
    "bert": Case(lambda: bert("sdpa"), WORDS, LABELS, "logits", logits),
    "bert_eager": Case(lambda: bert("eager"), WORDS, LABELS, "logits", logits),
    "gpt2": Case(lambda: gpt2("sdpa"), WORDS, NEXT, logits_second, logits_second),
    "gpt2_classifier": Case(lambda: gpt2_classifier("sdpa"), WORDS, LABELS, "logits", logits),
    "t5": Case(
        t5, WORDS | {"decoder_input_ids": TOKENS[:, :2]}, NEXT[:, :2], logits_second, logits_second, CE, FLOAT32
    ),
    "vit": Case(lambda: vit("sdpa"), {"pixel_values": IMAGES}, LABELS, 0, logits),
    "vit_eager": Case(lambda: vit("eager"), {"pixel_values": IMAGES}, LABELS, 0, logits, CE, FLOAT32),
    "llama": Case(lambda: llama("sdpa"), WORDS, NEXT, logits_second, logits_second, CE, FLOAT32),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_model(case: Case) -> None:
    check(case)


# Conv1D, whose weights are [in, out] -------------------------------------------------------------------------------

CONV1D = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.mark.parametrize("name", ["gpt2", "gpt2_classifier"])
def test_every_weight_of_gpt2_has_kronecker_factors(name: str) -> None:
    """`check` compares them with brute force; here, that none of them is left to another form."""
    blocks = check(MODELS[name])["kflr"]
    for layer in CONV1D:
        block = blocks[f"{layer}.weight"]
        assert isinstance(block, fxcurv.Kronecker)
        assert block.in_out
        assert blocks.status[f"{layer}.weight"] == "exact"


def test_gpt2_is_saved_merged_and_accumulated(tmp_path: Path) -> None:
    model, quantities = (
        samples.seeded(lambda: gpt2("sdpa"), "gpt2"),
        ["kflr", "grad", fxcurv.KFAC(fxcurv.Exact(), joint=True)],
    )
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), quantities, output=logits_second)
    batches = [(TOKENS[:1], NEXT[:1]), (TOKENS[1:], NEXT[1:])]
    whole, parts = compiled(TOKENS, NEXT), [compiled(*batch) for batch in batches]
    for k, part in enumerate(parts):
        part.save(tmp_path / f"{k}.safetensors")
    merged = fxcurv.merge(*(tmp_path / f"{k}.safetensors" for k in range(2)))
    for other in (merged, compiled.accumulate(batches)):
        for entry in whole.entries:
            assert entry.value is not None
            again = other[entry.quantity][entry.parameter]
            value, again = (v.dense() if isinstance(v, fxcurv.Block) else v for v in (entry.value, again))
            assert_close(again, value, f"{entry.quantity} of {entry.parameter}")
    joint = whole["kfac"][f"{CONV1D[0]}.weight"]
    assert joint.shape == (5, 12)
    assert joint is whole["kfac"][f"{CONV1D[0]}.bias"]


@pytest.mark.parametrize(("level", "width"), [("static", 64), ("shape", 64), ("numeric", 4)])
def test_check_finds_gpt2_exact(level: Any, width: int) -> None:
    """At every level, for weights too large for dense blocks; the last finds the same factors by autograd."""
    model, inputs = samples.seeded(lambda: gpt2("sdpa", width), "gpt2"), {"input_ids": TOKENS}
    report = fxcurv.check(model, inputs, ["kfac", "diag_ggn"], output=logits_second, level=level)
    assert {(row.status, row.code) for row in report.rows} == {("exact", "")}
