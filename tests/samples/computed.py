"""Parameters that go through other ops before they meet the data, and weights that are functions of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, SIGNAL, TOKENS, Free, Join, Model, Op, modules

# [4, 4] -> [3, 4], [4] or a number, which multiplies the tokens
OF_A_MATRIX: dict[str, Op] = {
    "softmax": lambda p: p.softmax(0)[1:],
    "log_softmax": lambda p: p.log_softmax(-1)[:3],
    "layer_norm": lambda p: F.layer_norm(p, (4,))[:3],
    "rms_norm": lambda p: F.rms_norm(p, (4,))[1:],
    "normalize": lambda p: F.normalize(p, dim=-1)[1:],
    "matmul": lambda p: (p @ p.T)[:3],
    "einsum": lambda p: torch.einsum("ij,kj,kl->il", p, p.tanh(), p)[1:],
    "division": lambda p: (p / p.square().sum())[:3],
    "powers": lambda p: p[0] ** 3 + p[1].abs() ** p[2] + 2 ** p[3],
    "roots": lambda p: (p.square() + 1).sqrt()[:3] * (p[0].square() + 1).rsqrt(),
    "exponentials": lambda p: p.exp()[:3] * (p[0].square() + 1).log() + F.softplus(p[1]),
    "clamps": lambda p: p.clamp(-0.3, 0.4)[:3] + p[3].clamp(min=0.1) * torch.minimum(p[1], p[2]),
    "where": lambda p: torch.where(p > 0, p.square(), p.sin())[:3].masked_fill(torch.eye(3, 4).bool(), 0.5),
    "extremes": lambda p: p.amax(0) * p.amin(1) + p.max(0).values,
    "moments": lambda p: (p - p.mean()).div(p.std())[:3] * p.var(0),
    "norms": lambda p: p[1:] / (p.norm(dim=0) + torch.linalg.vector_norm(p, 1)),
    "roll_flip": lambda p: p.roll((1, -1), (0, 1))[:3] * p.flip(0)[:3],
    "unfold": lambda p: F.unfold(p.view(1, 1, 4, 4), (2, 3))[0, :3, :4],
    "pixel_shuffle": lambda p: F.pixel_shuffle(p.view(4, 4, 1, 1), 2).flatten(1)[:3],
    "gather": lambda p: p.gather(0, torch.tensor([[1, 2, 2, 0], [3, 0, 0, 1], [1, 1, 1, 1]])),
    "index_select": lambda p: p.index_select(0, torch.tensor([3, 0, 3])) * p[[0, 1, 0]],
    "index_pairs": lambda p: p[torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1], [1], [3]])],
    "take_along_dim": lambda p: torch.take_along_dim(p, p.argsort(0), 0)[:3],
    "embedding": lambda p: F.embedding(torch.tensor([2, 0, 2]), p),
    "cumulative": lambda p: p.cumsum(0)[1:] * (1 + p / 3).cumprod(1)[:3],
    "logsumexp": lambda p: p.logsumexp(0) - p.logsumexp(1),
    "stacked": lambda p: torch.stack([a * b for a, b in zip(p.unbind(0), p.unbind(1), strict=True)])[:3],
    "repeated": lambda p: p[:1].repeat(3, 1) + p[1].expand(3, -1) * p[2:].flatten().repeat_interleave(2)[:4],
    "chunks": lambda p: torch.cat([a.tanh() for a in p.chunk(2, 1)], 1)[:3] + p.tensor_split(3)[0].sum(),
    "glu": lambda p: F.glu(p, 0).repeat(2, 1)[:3],
    "kron": lambda p: torch.kron(p[:2, :2], p[2:, 2:])[:3],
    "outer": lambda p: torch.outer(p[0], p[1])[:3],
    "cdist": lambda p: torch.cdist(p[:3], p + 1),
    "cosine": lambda p: F.cosine_similarity(p.unsqueeze(0), p.unsqueeze(1), -1)[:3],
    "triangles": lambda p: (p.tril() @ p.triu(1))[:3],
    "sorted": lambda p: p.sort(0).values[:3] * p.topk(1, 0).values,
    "trapezoid": lambda p: torch.trapezoid(p, dim=0) * p.diff(dim=0),
    "written": lambda p: p.clone().index_put((torch.tensor([1]),), p[0].sin())[:3],
    "diagonal": lambda p: p.diagonal() * torch.diag_embed(p[0])[:3],
    "spectrum": lambda p: torch.fft.rfft2(p).abs().square().log1p().mean() * torch.fft.fft(p).real[:3],
    "inverse": lambda p: torch.linalg.inv(p @ p.T + torch.eye(4, dtype=p.dtype))[:3],
    "orthogonal": lambda p: torch.linalg.matrix_exp(p - p.T)[:3],
    "detached_scale": lambda p: (p / p.detach().norm())[:3],
    "interpolated": lambda p: F.interpolate(p.view(1, 1, 4, 4), (3, 4), mode="bicubic")[0, 0],
    "antialiased": lambda p: F.interpolate(p.view(1, 1, 4, 4), (3, 4), mode="bilinear", antialias=True)[0, 0],
    "pooled": lambda p: F.avg_pool2d(p.view(1, 1, 4, 4), (2, 1), (1, 1))[0, 0] * F.max_pool1d(p, 4).T,
}


def written(p: Tensor) -> Tensor:
    """A parameter's copy is changed in place."""
    y = p.clone()
    y[1:] *= 2
    y[0, 1:3] = p[3, :2].sin()
    return y[:3]


def learned_queries(x: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(p.expand(x.shape[0], -1, -1), x, x.tanh())


def learned_bias(x: Tensor, p: Tensor) -> Tensor:
    """A table of relative positions, read by constant indices, is added to the scores."""
    index = torch.arange(3).unsqueeze(1) - torch.arange(3) + 2
    return F.scaled_dot_product_attention(x, x.tanh(), x.sin(), attn_mask=p[index])


def bias_from_mlp(x: Tensor, p: Tensor) -> Tensor:
    """Continuous relative positions through a small network whose weights are the parameter."""
    distance = (torch.arange(3.0, dtype=x.dtype).unsqueeze(1) - torch.arange(3)).unsqueeze(-1)
    return (x @ x.mT + ((distance @ p[:1]).relu() @ p[1:].T).squeeze(-1)).softmax(-1) @ x


def global_filter(x: Tensor, p: Tensor) -> Tensor:
    """A learned filter in the frequency domain, complex numbers as pairs of real ones."""
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(p), 3, dim=1)


def sampled_at(x: Tensor, p: Tensor) -> Tensor:
    """Learned places at which the tokens are read, as in deformable attention."""
    return F.grid_sample(x.unsqueeze(1), p.tanh().expand(x.shape[0], -1, -1, -1), align_corners=True)


WITH_TOKENS: dict[str, tuple[tuple[int, ...], Join]] = {
    "written_in_place": ((4, 4), lambda x, p: x * written(p)),
    "queries": ((1, 2, 4), learned_queries),
    "attention_bias": ((5,), learned_bias),
    "attention_bias_mlp": ((2, 4), bias_from_mlp),
    "global_filter": ((2, 4, 2), global_filter),
    "sampling_places": ((1, 2, 3, 2), sampled_at),
    "repeated_for_samples": (
        (2, 1, 4),
        lambda x, p: torch.cat([x, p.view(1, 2, 4).repeat(x.shape[0], 1, 2)[..., :4]], 1),
    ),
    "tiled_for_samples": ((2, 4), lambda x, p: p.repeat(x.shape[0], 1).view(x.shape[0], 2, 4).bmm(x.mT)),
    "bilinear_form": ((4, 4), lambda x, p: torch.einsum("nti,ij,nsj->nts", x, p, x.sin())),
    "distance": ((5, 4), lambda x, p: torch.cdist(x, p.expand(x.shape[0], -1, -1))),
    "cosine_head": ((2, 4), lambda x, p: F.linear(F.normalize(x, dim=-1), F.normalize(p, dim=-1))),
    "scaled_by_norm": ((4,), lambda x, p: F.normalize(x, dim=-1) * p.exp().clamp(max=1.4)),
    "softplus_temperature": ((1,), lambda x, p: (x / F.softplus(p)).softmax(-1)),
    "powers": ((1,), lambda x, p: x.clamp(min=0.1).pow(p.abs() + 1).mean(1).pow(1 / (p.abs() + 1))),
    "gated_sum": ((3,), lambda x, p: (torch.stack([x, x.sin(), x.square()]) * p.softmax(0).view(3, 1, 1, 1)).sum(0)),
    "where": ((4,), lambda x, p: torch.where(x > 0, x, p * x)),
    "masked": ((4,), lambda x, p: x.where((x.sum(-1, keepdim=True) > 0), p)),
    "scan": ((4,), lambda x, p: torch.stack([x[:, 0], y := x[:, 1] + p * x[:, 0], x[:, 2] + p * y], 1)),
    "token_scattered": ((4,), lambda x, p: x.index_copy(1, torch.tensor([1]), p.expand(x.shape[0], 1, -1))),
    "layer_norm_form": ((4,), lambda x, p: F.layer_norm(x, (4,), p, p.sin())),
    "packed_slices": ((9, 4), lambda x, p: F.linear(x, p[:3]) * F.linear(x, p[3:6]) + F.linear(x, p[6:])),
    "packed_chunks": ((6, 4), lambda x, p: F.linear(x, p.chunk(2)[0]) * F.linear(x, p.chunk(2)[1]).sigmoid()),
    "transposed_weight": ((4, 2), lambda x, p: F.linear(x, p.T)),
    "addmm": ((4, 2), lambda x, p: torch.addmm(p[0], x.flatten(0, 1), p).view(-1, 3, 2)),
    "glu_bias": ((8,), lambda x, p: F.glu(torch.cat([x, x], -1) + p, -1)),
    "low_rank": ((2, 4), lambda x, p: x + (x @ p.T) @ p.tanh()),
    "low_rank_weight": ((3, 4), lambda x, p: F.linear(x, p.T[:, :1] @ p[1:2])),
}


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight is standardised: by mean and variance, or by batch_norm as in timm."""

    def __init__(self, how: str, **options: Any) -> None:
        super().__init__(4, 3, 2, **options)
        self.how, self.gain = how, nn.Parameter(torch.rand(3, 1, 1, 1) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        if self.how == "batch_norm":
            scale = (self.gain * self.weight[0].numel() ** -0.5).view(-1)
            weight = F.batch_norm(self.weight.reshape(1, 3, -1), None, None, weight=scale, training=True)
            weight = weight.reshape_as(self.weight)
        else:
            variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
            weight = self.gain * (self.weight - mean) / torch.sqrt(variance + 1e-3)
        return self._conv_forward(input, weight, self.bias)


class KernelMixture(nn.Module):
    """A convolution whose weight is a mixture of kernels with learned weights, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.logits = nn.Parameter(torch.randn(3, 2, 4, 2, 2) / 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.logits.softmax(0).view(3, 1, 1, 1, 1) * self.kernels).sum(0), stride=2)


class ConditionalConv(nn.Module):
    """A kernel for each sample, mixed by what the sample looks like: one grouped convolution over [1, N C, H, W]."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.kernels, self.router, self.folded = nn.Parameter(torch.randn(3, 2, 4, 2, 2) / 3), nn.Linear(4, 3), folded

    def forward(self, x: Tensor) -> Tensor:
        mixture = self.router(x.mean((2, 3))).sigmoid()
        if not self.folded:
            each = torch.stack([F.conv2d(x, kernel) for kernel in self.kernels.unbind(0)], 1)
            return (each * mixture.view(-1, 3, 1, 1, 1)).sum(1)
        weight = (mixture @ self.kernels.flatten(1)).view(-1, 4, 2, 2)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, groups=x.shape[0])
        return y.view(x.shape[0], 2, *y.shape[2:])


class HyperLinear(nn.Module):
    """A weight for each sample, made by a layer from the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x[..., :2], x, self.maker(x.mean(1)).view(-1, 4, 2))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "standardized": lambda: StandardizedConv("moments"),
    "kernel_mixture": KernelMixture,
    "conditional_conv": lambda: ConditionalConv(folded=False),
    "bias_of_weight": lambda: Model(
        lambda m, x: F.conv2d(x, m.c.weight, m.c.weight.sum((1, 2, 3))), c=nn.Conv2d(4, 2, 2, bias=False)
    ),
}

COMPUTED = (
    *modules(
        "computed", TOKENS, {name: lambda f=f: Free((4, 4), lambda x, p: x * f(p)) for name, f in OF_A_MATRIX.items()}
    ),
    *modules("with", TOKENS, {name: lambda s=shape, j=join: Free(s, j) for name, (shape, join) in WITH_TOKENS.items()}),
    *modules("weight", IMAGE, LAYERS),
    *modules("weight", TOKENS, {"hyper": HyperLinear}),
    *modules(
        "weight",
        SIGNAL,
        {"transposed": lambda: Free((4, 2, 3), lambda x, p: F.conv_transpose1d(x, p.exp(), p[0, :, 0]))},
    ),
)
