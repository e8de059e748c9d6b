"""Products of data with data: matrices, distances, similarities, spectra; experts; and embeddings of integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, TOKENS, Model, Op, functions, modules


def magnitudes(x: Tensor) -> Tensor:
    """The spectrum's magnitudes, away from zero."""
    return (torch.fft.rfft2(x).abs().square() + 1).log()


def filtered(x: Tensor) -> Tensor:
    """A low-pass filter in the frequency domain."""
    spectrum = torch.fft.rfft2(x, norm="ortho")
    return torch.fft.irfft2(spectrum * torch.linspace(1, 0, 3, dtype=x.dtype), s=(6, 5), norm="ortho")


def spectrum_parts(x: Tensor) -> Tensor:
    spectrum = torch.fft.fft(x, dim=-1)
    return torch.cat([spectrum.real, spectrum.imag], 1)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding by complex numbers."""
    z = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
    turn = torch.polar(torch.ones(3, 2, dtype=x.dtype), torch.arange(6, dtype=x.dtype).view(3, 2))
    return torch.view_as_real(z * turn).flatten(2)


def rotary(x: Tensor) -> Tensor:
    """Rotary embedding by halves."""
    angle = torch.arange(3, dtype=x.dtype).unsqueeze(-1) * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
    half = torch.cat([-x[..., 2:], x[..., :2]], -1)
    return x * angle.cos() + half * angle.sin()


MATRICES: dict[str, Op] = {
    "bmm": lambda x: torch.bmm(x, x.mT),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.tanh().mT, beta=0.5, alpha=2),
    "einsum_trace": lambda x: torch.einsum("ntc,ntd->ncd", x, x.sin()),
    "einsum_outer": lambda x: torch.einsum("nt,nc->ntc", x[..., 0], x[:, 0].tanh()),
    "einsum_three": lambda x: torch.einsum("nac,nbc,nbd->nad", x, x.sin(), x),
    "matmul_vector": lambda x: x @ x[:, 0].unsqueeze(-1),
    "matmul_broadcast": lambda x: x.unsqueeze(1) @ x.mT.sin().unsqueeze(1).expand(-1, 2, -1, -1),
    "matmul_constant": lambda x: torch.arange(9, dtype=x.dtype).view(3, 3).cos() @ x,
    "tensordot": lambda x: torch.tensordot(x, torch.arange(8, dtype=x.dtype).view(4, 2).sin(), 1),
    "inner": lambda x: torch.inner(x, torch.arange(8, dtype=x.dtype).view(2, 4).sin()),
    "outer": lambda x: x[:, 0].unsqueeze(2) * x[:, 1].unsqueeze(1),
    "kron_by_hand": lambda x: (x[:, :, None, :, None] * x.sin()[:, None, :, None, :]).reshape(x.shape[0], 9, 16),
    "cdist": lambda x: torch.cdist(x, x[:, :2] + 1),
    "cdist_one": lambda x: torch.cdist(x, x.flip(2) + 1, p=1),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.roll(1, 1), p=2),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.roll(1, 1).sin(), dim=-1),
    "cosine_matrix": lambda x: F.normalize(x, dim=-1) @ F.normalize(x.tanh(), dim=-1).mT,
    "cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 1:]),
    "inverse": lambda x: torch.linalg.inv(x @ x.mT + torch.eye(3, dtype=x.dtype)),
    "solve": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, dtype=x.dtype), x),
    "determinant": lambda x: torch.linalg.slogdet(x @ x.mT + torch.eye(3, dtype=x.dtype)).logabsdet.unsqueeze(-1),
    "matrix_power": lambda x: torch.linalg.matrix_power(x @ x.mT / 4, 3),
    "matrix_exp": lambda x: torch.linalg.matrix_exp(x @ x.mT / 4),
    "covariance": lambda x: (y := x - x.mean(1, keepdim=True)).mT @ y / 2,
    "view_as_complex": rotated,
    "rotary": rotary,
}
SPECTRA: dict[str, Op] = {
    "fft2_real": lambda x: torch.fft.fft2(x).real,
    "fnet": lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
    "rfft2_magnitude": magnitudes,
    "rfft2_filter": filtered,
    "complex_parts": lambda x: torch.tensor_split(torch.fft.fft(x), 2, 1)[1].real * x[:, 2:],
    "complex_pick": lambda x: torch.fft.fft(x)[torch.arange(x.shape[0]), x.mean((2, 3)).argmax(1)].imag,
    "fft_parts": spectrum_parts,
    "angle_free": lambda x: torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft2(x), (2, 3))).imag,
    "rfft_real_view": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=2)).flatten(3),
    "complex_conv": lambda x: torch.fft.irfft(torch.fft.rfft(x, 8) * torch.fft.rfft(x.sin(), 8).conj(), 8),
}


class Experts(nn.Module):
    """A soft mixture of three experts, their matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("ntc,eco->nteo", x, self.experts)
        return (self.router(x).softmax(-1).unsqueeze(-1) * each).sum(2)


class Dispatched(nn.Module):
    """Every token goes to the expert with the largest logit: bmm over experts, the others masked."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.Parameter(torch.randn(2, 4, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        tokens = x.reshape(-1, 4).unsqueeze(0).expand(2, -1, -1)
        each = torch.bmm(tokens, self.experts).view(2, x.shape[0], -1, 3)
        mask = F.one_hot(chosen.squeeze(-1), 2).movedim(-1, 0).unsqueeze(-1)
        return (each * mask).sum(0) * weight


PARTS: dict[str, Callable[[], Op]] = {
    "experts": Experts,
    "dispatched_experts": Dispatched,
    "bilinear": lambda: Model(lambda m, x: m.b(x[..., :3], x[..., 1:]), b=nn.Bilinear(3, 3, 2)),
    "cosine_module": lambda: nn.Sequential(
        nn.Unflatten(2, (2, 2)), Model(lambda m, x: m.c(x[..., 0], x[..., 1]), c=nn.CosineSimilarity(2))
    ),
}

PRODUCTS = (
    *functions("matrix", TOKENS, MATRICES),
    *functions("spectrum", IMAGE, SPECTRA),
    *modules("matrix", TOKENS, PARTS),
)
