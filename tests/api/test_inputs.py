"""What goes in and what comes out: several inputs in any nesting, masks of any type, outputs by name, dense outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import samples
import torch
from input_cases import Case, check
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv
from fxcurv.frontend.inputs import Inputs, Output

N = 3


G = torch.Generator().manual_seed(0)


A, B = (torch.randn(N, size, dtype=torch.float64, generator=G) for size in (3, 2))


SEQUENCE = torch.randn(N, 4, 2, dtype=torch.float64, generator=G)


IMAGES = torch.randn(N, 2, 3, 4, dtype=torch.float64, generator=G)


TOKENS = torch.randint(7, (N, 4), generator=G)


LABELS = torch.tensor([0, 2, 1])


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


# Inputs -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Record:
    a: Tensor
    b: Tensor


torch.export.register_dataclass(Record, serialized_type_name="tests.Record")


class Joined(nn.Module):
    """head(tanh(fa(a) * fb(b))) of two inputs that `take` finds among the arguments."""

    def __init__(self, take: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.fa, self.fb, self.head, self.take = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3), take

    def join(self, *args: Any, **kwargs: Any) -> Tensor:
        a, b = self.take(*args, **kwargs)
        return self.head((self.fa(a) * self.fb(b)).tanh())


class Two(Joined):
    def forward(self, a: Tensor, b: Tensor, scale: float | None = None, flag: bool = True) -> Tensor:
        y = self.join(a, b)
        return y if scale is None or not flag else y * scale


class KeywordOnly(Joined):
    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
        return self.join(a, b)


class AnyKeywords(Joined):
    def forward(self, a: Tensor, **others: Tensor) -> Tensor:
        return self.join(a, others["b"])


class AnyNumber(Joined):
    def forward(self, *both: Tensor) -> Tensor:
        return self.join(*both)


class One(Joined):
    def forward(self, nested: Any) -> Tensor:
        return self.join(nested)


def pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b


INPUTS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "tuple": (lambda: Two(pair), (A, B)),
    "dict": (lambda: Two(pair), {"a": A, "b": B}),
    "dict_in_other_order": (lambda: Two(pair), {"b": B, "a": A}),
    "dict_with_numbers": (lambda: Two(pair), {"a": A, "b": B, "scale": 0.5, "flag": True}),
    "tuple_with_none": (lambda: Two(pair), (A, B, None, False)),
    "keyword_only": (lambda: KeywordOnly(pair), {"a": A, "b": B}),
    "any_keywords": (lambda: AnyKeywords(pair), {"a": A, "b": B}),
    "any_number": (lambda: AnyNumber(pair), (A, B)),
    "dict_in_tuple": (lambda: One(lambda d: (d["a"], d["b"])), ({"a": A, "b": B},)),
    "list_of_tensors": (lambda: One(lambda xs: (xs[0], xs[1])), ([A, B],)),
    "tuple_in_dict": (lambda: One(lambda t: t), {"nested": (A, B)}),
    "deep": (lambda: One(lambda d: (d["x"][0], d["x"][1]["b"])), ({"x": [A, {"b": B}]},)),
    "namedtuple": (lambda: One(lambda p: (p.a, p.b)), (Pair(A, B),)),
    "dataclass": (lambda: One(lambda r: (r.a, r.b)), (Record(A, B),)),
    "numbers_in_nested": (lambda: One(lambda d: (d["a"] * d["by"], d["b"])), ({"a": A, "b": B, "by": 2.0},)),
}


@pytest.mark.parametrize(("build", "inputs"), INPUTS.values(), ids=INPUTS)
def test_inputs(build: Callable[[], nn.Module], inputs: Inputs) -> None:
    check(Case(build, inputs, LABELS))


# Tokens and masks -------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Token and position embeddings, attention under a mask, and the masked mean."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(4, 4)
        self.qkv, self.head, self.how = nn.Linear(4, 12), nn.Linear(4, 3), how

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "additive":
            scores = q @ k.mT + (1.0 - mask.to(x.dtype))[:, None] * torch.finfo(x.dtype).min
        elif self.how == "fill":
            scores = (q @ k.mT).masked_fill(mask[:, None] == 0, -torch.inf)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None].bool())
            return self.head((y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))
        y = scores.softmax(-1) @ v
        return self.head((y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class LastToken(nn.Module):
    """The logits at the last token that is not padding, as sequence classifiers of decoders take them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.head(self.words(tokens).cumsum(1).tanh())
        last = (torch.arange(tokens.shape[1]) * mask).argmax(-1)
        return logits[torch.arange(tokens.shape[0]), last]


class Bag(nn.Module):
    """`nn.EmbeddingBag` of two-dimensional indices."""

    def __init__(self, mode: str, weighted: bool = False) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 3)
        self.weighted = weighted

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.bag(tokens, per_sample_weights=mask if self.weighted else None))


MASKS = {"float": MASK.double(), "bool": MASK.bool(), "int": MASK, "int32": MASK.int()}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("how", ["additive", "fill", "attention"])
def test_tokens_with_masks(how: str, kind: str) -> None:
    check(Case(lambda: Encoder(how), {"tokens": TOKENS, "mask": MASKS[kind]}, LABELS))


def test_the_last_token_of_each_sample() -> None:
    check(Case(LastToken, (TOKENS, MASK), LABELS))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_tokens(mode: str) -> None:
    check(Case(lambda: Bag(mode), (TOKENS, MASKS["float"]), LABELS))


def test_bags_with_weights() -> None:
    check(Case(lambda: Bag("sum", weighted=True), (TOKENS, MASKS["float"]), LABELS))


# Outputs ----------------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Logits and hidden features, in the container that `wrap` makes of them."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.wrap = nn.Linear(3, 4), nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).tanh()
        return self.wrap(self.head(hidden), hidden)


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Output]] = {
    "key": (lambda y, h: {"logits": y, "hidden": h}, "logits"),
    "attribute": (Pair, "a"),
    "index": (lambda y, h: (h, y), 1),
    "negative_index": (lambda y, h: [h, h, y], -1),
    "function": (lambda y, h: {"deep": (h, {"y": y})}, lambda out: out["deep"][1]["y"]),
    "computed": (lambda y, h: (y, h), lambda out: 2 * out[0]),
    "single": (lambda y, h: (y,), 0),
    "with_none": (lambda y, h: (None, y, 3.0), 1),
    "dataclass": (Record, "a"),
}


@pytest.mark.parametrize(("wrap", "output"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(wrap: Callable[[Tensor, Tensor], Any], output: Output) -> None:
    def choose(out: Any) -> Tensor:
        if callable(output):
            return output(out)
        return getattr(out, output) if isinstance(output, str) and not isinstance(out, dict) else out[output]

    check(Case(lambda: Several(wrap), A, LABELS, output, choose))


@pytest.mark.parametrize("output", ["missing", 7, None])
def test_an_output_that_is_not_there_is_refused(output: Output) -> None:
    model = samples.seeded(lambda: Several(lambda y, h: {"logits": y}), "inputs")
    with pytest.raises(fxcurv.FxcurvError) as caught:
        fxcurv.compile(model, output=output)(A, LABELS)
    assert "logits" in str(caught.value)


# Dense outputs ----------------------------------------------------------------------------------------------------


def features_second(out: Tensor) -> Tensor:
    """[N, T, C] -> [N, C, T], as cross entropy wants it."""
    return out.transpose(1, 2)


PADDED = torch.tensor([[0, 2, 1, -100], [1, 1, -100, -100], [2, -100, -100, -100]])


PIXELS = torch.randint(3, (N, 3, 4), generator=G)


IGNORED = PIXELS.masked_fill(torch.rand(PIXELS.shape, generator=G) < 0.5, 255)


def tokens_that_mix() -> nn.Module:
    """[N, 4, 2] -> [N, 4, 3]."""
    return nn.Sequential(nn.TransformerEncoderLayer(2, 1, 3, batch_first=True), nn.Linear(2, 3))


def segmentation() -> nn.Module:
    """[N, 2, 3, 4] -> [N, 3, 3, 4], down and up again."""
    return nn.Sequential(
        *(nn.Conv2d(2, 2, 2, stride=2, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)),
        nn.Upsample((3, 4), mode="bilinear"),
    )


DENSE = {
    "tokens": Case(tokens_that_mix, SEQUENCE, PADDED.clamp(min=0), features_second, features_second),
    "padded_tokens": Case(tokens_that_mix, SEQUENCE, PADDED, features_second, features_second),
    "tokens_regression": Case(tokens_that_mix, SEQUENCE, SEQUENCE[..., :1].expand(-1, -1, 3), loss=nn.MSELoss()),
    "tokens_labels": Case(
        tokens_that_mix, SEQUENCE, SEQUENCE.sum(-1, True).gt(0).double().expand(-1, -1, 3), loss=nn.BCEWithLogitsLoss()
    ),
    "pixels": Case(segmentation, IMAGES, PIXELS),
    "ignored_pixels": Case(segmentation, IMAGES, IGNORED, loss=nn.CrossEntropyLoss(ignore_index=255)),
    "summed_pixels": Case(segmentation, IMAGES, IGNORED, loss=nn.CrossEntropyLoss(ignore_index=255, reduction="sum")),
}


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_dense_outputs(case: Case) -> None:
    check(case)
