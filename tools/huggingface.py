"""Forty architectures of Hugging Face, shrunk: small random models from configurations alone, nothing is downloaded.

`build(name, batch)` gives a model whose `forward` returns one tensor, and its inputs. A row of `MODELS` says how: the
class of the model, what its configuration says apart from sizes, which of its outputs is taken, and its inputs.
Logits over a vocabulary come out as [N, classes, positions], the layout of cross entropy.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

transformers: Any = importlib.import_module("transformers")  # by name: what checks the types need not have it
Inputs = tuple[Tensor, ...]

VOCABULARY, TOKENS, WIDTH, HEADS, LAYERS, SIDE, CLASSES = 64, 12, 32, 4, 2, 32, 5

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
    "image_size": SIDE,
    "patch_size": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "use_cache": False,
}
"""The sizes of all models, as far as a configuration has them under these names."""


# Inputs -----------------------------------------------------------------------------------------------------------


def tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(batch * TOKENS).view(batch, TOKENS) % (VOCABULARY - 8) + 4}


def masked_tokens(batch: int) -> dict[str, Tensor]:
    """The last two positions are padding."""
    return {**tokens(batch), "attention_mask": (torch.arange(TOKENS) < TOKENS - 2).long().repeat(batch, 1)}


def both_sides(batch: int) -> dict[str, Tensor]:
    ids = tokens(batch)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, :6]}


def image(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(batch, 3, SIDE, SIDE)}


def waveform(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.zeros(batch, 1600)}


def spectrogram(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.zeros(batch, 64, 32)}


def speech(batch: int) -> dict[str, Tensor]:
    ids = tokens(batch)["input_ids"]
    return {"input_features": torch.zeros(batch, 16, 64), "decoder_input_ids": ids[:, :6]}


# Models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A class of transformers, the inputs of its model, which output is taken, and what its configuration adds."""

    name: str
    inputs: Callable[[int], dict[str, Tensor]]
    output: str = "logits"
    options: dict[str, Any] = field(default_factory=dict)


class OneTensor(nn.Module):
    """A model that takes its inputs by position and returns one of its outputs, classes on axis 1."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        given = [value for value in (first, second) if value is not None]
        returned = self.model(**dict(zip(self.names, given, strict=True)))[self.output]
        return returned.transpose(1, 2) if returned.ndim == 3 else returned


def build(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    """A model with untrained weights, in eval mode, and inputs for it."""
    recipe = MODELS[name]
    kind = getattr(transformers, recipe.name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = kind(configuration(kind.config_class, recipe.options)).eval()
    inputs = recipe.inputs(batch)
    return OneTensor(model, tuple(inputs), recipe.output), tuple(inputs.values())


def configuration(kind: Any, options: dict[str, Any]) -> Any:
    """A configuration of these sizes, as far as it knows them."""
    known = kind()
    names = ("num_labels", "image_size") if hasattr(known, "depths") else (*COMMON,)  # stages have sizes of their own
    sizes = {name: COMMON[name] for name in names if hasattr(known, name) or name == "num_labels"}
    return kind(**(sizes | options))


def text(name: str, **options: Any) -> Recipe:
    return Recipe(f"{name}ForSequenceClassification", tokens, options=options)


def language(name: str, **options: Any) -> Recipe:
    return Recipe(f"{name}ForCausalLM", tokens, options=options)


def translation(name: str, **options: Any) -> Recipe:
    return Recipe(f"{name}ForConditionalGeneration", both_sides, options=options)


def picture(name: str, **options: Any) -> Recipe:
    return Recipe(f"{name}ForImageClassification", image, options=options)


def sound(name: str, **options: Any) -> Recipe:
    return Recipe(f"{name}ForSequenceClassification", waveform, options=options)


SEQUENCE_TO_SEQUENCE: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "decoder_start_token_id": 0,
}
PYRAMID: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WAVES: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

MODELS: dict[str, Recipe] = {
    "albert": text("Albert", embedding_size=16),
    "audio_spectrogram_transformer": Recipe(
        "ASTForAudioClassification",
        spectrogram,
        options={"num_mel_bins": 32, "max_length": 64, "patch_size": 16, "frequency_stride": 8, "time_stride": 8},
    ),
    "bart": translation("Bart", **SEQUENCE_TO_SEQUENCE),
    "bert": text("Bert"),
    "bert_masked_lm": Recipe("BertForMaskedLM", tokens),
    "bert_attention_mask": Recipe("BertForSequenceClassification", masked_tokens),
    "bloom": language("Bloom", n_layer=LAYERS, n_head=HEADS),
    "clip_text": Recipe("CLIPTextModel", tokens, "pooler_output", {"eos_token_id": 2}),
    "clip_vision": Recipe("CLIPVisionModel", image, "pooler_output"),
    "convnext": picture("ConvNext", patch_size=4, **PYRAMID),
    "data2vec_text": text("Data2VecText"),
    "deberta": text("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": text("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deit": picture("DeiT"),
    "dinov2": picture("Dinov2"),
    "distilbert": text("DistilBert", dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=2 * WIDTH),
    "electra": text("Electra", embedding_size=16),
    "falcon": language("Falcon"),
    "gemma3": language("Gemma3", head_dim=8),
    "gpt2": Recipe("GPT2LMHeadModel", tokens),
    "gpt2_attention_mask": Recipe("GPT2LMHeadModel", masked_tokens),
    "gpt_neox": language("GPTNeoX"),
    "hubert": sound("Hubert", **WAVES),
    "llama": language("Llama"),
    "llama_attention_mask": Recipe("LlamaForCausalLM", masked_tokens),
    "mamba": language("Mamba", state_size=4, time_step_rank=4),
    "mixtral": language("Mixtral", num_local_experts=4),
    "mobilebert": text("MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "mobilevit": picture(
        "MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], patch_size=2
    ),
    "modernbert": text("ModernBert"),
    "mpnet": text("MPNet"),
    "opt": language("OPT", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH),
    "pegasus": translation("Pegasus", **SEQUENCE_TO_SEQUENCE),
    "phi": language("Phi"),
    "qwen3_moe": language("Qwen3Moe", head_dim=8, **EXPERTS),
    "segformer": picture("Segformer", num_attention_heads=[1, 2, 2, 4], patch_sizes=[7, 3, 3, 3], **PYRAMID),
    "swin": picture("Swin", patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "t5": translation("T5", d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS),
    "wav2vec2": sound("Wav2Vec2", **WAVES),
    "whisper": Recipe(
        "WhisperForConditionalGeneration",
        speech,
        options={"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 16} | SEQUENCE_TO_SEQUENCE,
    ),
}
