"""Parameters: tied, reused, frozen, unreached, branches around them, and forms of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import TOKENS, VECTOR, Free, Model, mlp, modules, normal, sample


def tie(model: nn.Module, first: str, second: str) -> nn.Module:
    """The parameter `second` becomes the parameter `first`."""
    owner, _, leaf = second.rpartition(".")
    setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    return model


def freeze(model: nn.Module, *names: str) -> nn.Module:
    """The model with the named parameters frozen."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def small_cnn() -> nn.Sequential:
    """Conv, BatchNorm, ReLU, Conv, global mean, Linear."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def applied_twice() -> nn.Module:
    """head(fc(tanh(fc(x))))."""
    return Model(lambda m, x: m.head(m.fc(m.fc(x).tanh())), fc=nn.Linear(3, 3), head=nn.Linear(3, 3))


def two_layers(o: int = 3) -> nn.Module:
    """fc2(tanh(fc1(x)))."""
    return Model(lambda m, x: m.fc2(m.fc1(x).tanh()), fc1=nn.Linear(3, o), fc2=nn.Linear(o, 3))


def one_module_two_names() -> nn.Module:
    """The same Linear registered as `a` and as `b`."""
    fc = nn.Linear(3, 3)
    return Model(lambda m, x: m.head(m.b(m.a(x).tanh())), a=fc, b=fc, head=nn.Linear(3, 3))


def conv_reused() -> nn.Module:
    """One convolution on two resolutions."""
    return Model(
        lambda m, x: m.head(m.conv(m.conv(x).relu()).mean((2, 3)) + m.conv(x).mean((2, 3))),
        conv=nn.Conv2d(2, 2, 3, stride=2, padding=1),
        head=nn.Linear(2, 3),
    )


def grouped_reused() -> nn.Module:
    """One grouped convolution applied twice."""
    return Model(
        lambda m, x: m.head(m.conv(m.conv(x).tanh()).mean(-1)),
        conv=nn.Conv1d(4, 4, 3, padding=1, groups=2),
        head=nn.Linear(4, 3),
    )


def siamese() -> nn.Module:
    """One encoder on two halves of the input; the head sees both and their product."""
    return Model(
        lambda m, x: m.head(torch.cat([a := m.encoder(x[:, 0]), b := m.encoder(x[:, 1]), a * b], dim=-1)),
        encoder=mlp(3, 4, 2),
        head=nn.Linear(6, 3),
    )


def parallel() -> nn.Module:
    """Three layers with one input, joined in different ways."""
    return Model(
        lambda m, x: m.head(torch.cat([m.q(x) * m.k(x), m.v(x).relu()], 1)),
        q=nn.Linear(3, 2),
        k=nn.Linear(3, 2),
        v=nn.Linear(3, 4),
        head=nn.Linear(6, 3),
    )


def dense_residual() -> nn.Module:
    """x -> x + f(x) twice, and everything before joins at the end."""
    return Model(
        lambda m, x: m.head((h := x + m.a(x).relu()) + (g := h + m.b(h).tanh()) + x * g),
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 3),
        head=nn.Linear(3, 3),
    )


def never_called() -> nn.Module:
    """A layer that is not called, and one whose result is not used."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.wasted(x)
        return m.head(m.fc(x).tanh())

    return Model(forward, fc=nn.Linear(3, 4), unused=nn.Linear(3, 4), wasted=nn.Linear(3, 2), head=nn.Linear(4, 3))


def loop_over_time() -> nn.Module:
    """A recurrent cell, unrolled over three steps."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.start(x[:, 0])
        for t in range(1, x.shape[1]):
            h = torch.tanh(m.input(x[:, t]) + m.hidden(h))
        return m.head(h)

    parts = {"start": nn.Linear(2, 3), "input": nn.Linear(2, 3), "hidden": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    return Model(forward, **parts)


class Right(nn.Module):
    """x W + b with W[i,o], all axes of x but the last folded into one, as transformers' Conv1D."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o) / 2), nn.Parameter(torch.randn(o) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


def right(forward: Callable[[Any, Tensor], Tensor], i: int = 3) -> Callable[[], nn.Module]:
    """A model whose `fc` holds `weight[i,4]` and `bias[4]`, and its head."""
    return lambda: Model(forward, fc=Right(i, 4), head=nn.Linear(4, 3))


def tied_embedding() -> nn.Module:
    """Rows of a table, picked and multiplied with."""
    picked = torch.tensor([0, 5, 5])
    return Model(
        lambda m, x: m.fc(x + m.rows.weight[picked]).tanh() @ m.rows.weight.T,
        rows=nn.Embedding(6, 4),
        fc=nn.Linear(4, 4),
    )


PARAMETERS = (
    sample("param.applied_twice", applied_twice, (3,)),
    sample("param.applied_twice_tokens", applied_twice, (4, 3), out=(4, 3), loss=nn.MSELoss, target=normal),
    sample("param.one_module_two_names", one_module_two_names, (3,)),
    sample("param.tied_weight", lambda: tie(two_layers(), "fc1.weight", "fc2.weight"), (3,)),
    sample("param.tied_bias", lambda: tie(two_layers(), "fc1.bias", "fc2.bias"), (3,)),
    sample("param.tied_both", lambda: tie(tie(two_layers(), "fc1.weight", "fc2.weight"), "fc1.bias", "fc2.bias"), (3,)),
    sample("param.conv_reused", conv_reused, (2, 5, 6)),
    sample("param.grouped_reused", grouped_reused, (4, 5)),
    sample("param.siamese", siamese, (2, 3)),
    sample("param.parallel", parallel, (3,)),
    sample("param.dense_residual", dense_residual, (3,)),
    sample("param.loop_over_time", loop_over_time, (3, 2)),
    sample("param.never_called", never_called, (3,)),
    sample("right.conv1d", right(lambda m, x: m.head(m.fc(x).tanh().mean(1))), (2, 3)),
    sample("right.vector", right(lambda m, x: m.head(m.fc(x).tanh())), (3,)),
    sample("right.mm", right(lambda m, x: m.head((torch.mm(x, m.fc.weight) + m.fc.bias).tanh())), (3,)),
    sample("right.matmul", right(lambda m, x: m.head((x @ m.fc.weight + m.fc.bias).tanh().mean((1, 2)))), (2, 2, 3)),
    sample("right.linear", right(lambda m, x: m.head(F.linear(x, m.fc.weight.t(), m.fc.bias).tanh().mean(1))), (2, 3)),
    sample(
        "right.reshaped_bias", right(lambda m, x: m.head(torch.addmm(m.fc.bias[None], x, m.fc.weight).tanh())), (3,)
    ),
    sample("right.scaled", right(lambda m, x: m.head(torch.addmm(m.fc.bias, x, m.fc.weight, beta=2, alpha=3))), (3,)),
    sample(
        "right.samples_behind",
        right(lambda m, x: m.head((x.mT.movedim(0, 1) @ m.fc.weight + m.fc.bias).tanh().mean(0))),
        (3, 2),
    ),
    sample("right.one_feature", right(lambda m, x: m.head(m.fc(x.unsqueeze(-1)).tanh().mean(1)), 1), (3,)),
    sample("right.twice", right(lambda m, x: m.head(m.fc(m.fc(x)[:, 1:].tanh()))), (3,)),
    sample("right.autoencoder", right(lambda m, x: m.head(m.fc(F.linear(m.fc(x).tanh(), m.fc.weight)))), (3,)),
    sample("right.autoencoder_rows", right(lambda m, x: m.head(m.fc(m.fc(x).tanh() @ m.fc.weight.mT))), (3,)),
    sample("right.and_left", right(lambda m, x: m.head(m.fc(x) * m.fc.weight.sum(0))), (3,)),
    sample("right.transposed", right(lambda m, x: m.fc(x).tanh() @ m.head.weight.T + m.head.bias), (3,)),
    sample("right.own_bias", right(lambda m, x: m.head(m.fc.bias + torch.addmm(m.fc.weight, x, m.fc.weight)), 1), (1,)),
    sample("right.tied_embedding", tied_embedding, (3, 4), out=(3, 6)),
    sample("right.frozen_weight", lambda: freeze(right(lambda m, x: m.head(m.fc(x)))(), "fc.weight"), (3,)),
    sample("right.frozen_bias", lambda: freeze(right(lambda m, x: m.head(m.fc(x)))(), "fc.bias"), (3,)),
    sample("param.frozen_body", lambda: freeze(two_layers(4), "fc1.weight", "fc1.bias"), (3,)),
    sample("param.frozen_head", lambda: freeze(two_layers(4), "fc2.weight", "fc2.bias"), (3,)),
    sample("param.frozen_weight", lambda: freeze(two_layers(4), "fc1.weight"), (3,)),
    sample("param.frozen_bias", lambda: freeze(two_layers(4), "fc2.bias"), (3,)),
    sample("param.frozen_all_but_bias", lambda: freeze(two_layers(4), "fc1.weight", "fc2.weight", "fc2.bias"), (3,)),
    sample("param.frozen_norm", lambda: freeze(small_cnn(), "1.weight", "1.bias"), (2, 5, 5)),
    sample("param.frozen_but_norm", lambda: freeze(small_cnn(), "0.weight", "3.weight", "3.bias", "1.bias"), (2, 5, 5)),
    sample("param.frozen_tied", lambda: freeze(tie(two_layers(), "fc1.weight", "fc2.weight"), "fc1.weight"), (3,)),
)


FREE = (
    *modules(
        "free",
        TOKENS,
        {
            "additive": lambda: Free((1, 3, 4), lambda x, p: x + p),
            "scale": lambda: Free((4,), lambda x, p: x * p),
            "token": lambda: Free((1, 1, 4), lambda x, p: torch.cat([p.expand(x.shape[0], -1, -1), x], dim=1)),
            "matmul": lambda: Free((4, 2), lambda x, p: x @ p),
            "computed_weight": lambda: Free((2, 4), lambda x, p: F.linear(x, p - p.mean(1, keepdim=True))),
            "weight_and_penalty": lambda: Free((2, 4), lambda x, p: F.linear(x, p) * p.square().sum()),
            "temperature": lambda: Free((), lambda x, p: x * p.exp()),
            "prelu": lambda: nn.PReLU(3),
            "prelu_shared": lambda: nn.PReLU(),
            "rms_norm": lambda: nn.RMSNorm(4),
            "sliced": lambda: Free((3, 5, 4), lambda x, p: x + p[:, 1]),
            "interpolated": lambda: Free((1, 2, 4), lambda x, p: x + F.interpolate(p.mT, 3, mode="linear").mT),
            "gathered": lambda: Free((7, 4), lambda x, p: x + p[torch.tensor([0, 5, 5])]),
            "used_twice": lambda: Free((4,), lambda x, p: (x * p).relu() + p),
            "through_mlp": lambda: Free((4, 4), lambda x, p: x + (torch.eye(4, dtype=x.dtype) @ p).tanh()[:3]),
            "layer_norm": lambda: nn.LayerNorm(4),
            "conv_transpose": lambda: nn.ConvTranspose1d(3, 2, 2),
        },
    ),
    *modules("free", VECTOR, {"prelu_of_vector": lambda: nn.PReLU(4)}),
)
