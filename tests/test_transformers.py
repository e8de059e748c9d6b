"""Encoders and decoders in the style of Hugging Face, with random weights, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_inputs import Case, check
from torch import Tensor, nn

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


def gpt2(attention: str) -> nn.Module:
    """A language model with its output layer tied to its embedding."""
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=4,
        n_embd=4,
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
