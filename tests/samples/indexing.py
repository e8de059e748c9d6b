"""Entries picked by constants or by the data, written in place, counted, masked and routed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from samples.rows import IMAGE, TOKENS, Op, functions

ORDER = torch.tensor([2, 0, 1, 2])
PICKED: dict[str, Op] = {
    "gather_constant": lambda x: x.gather(1, ORDER.view(1, 4, 1, 1).expand(x.shape[0], 4, 6, 5)),
    "take_along_dim": lambda x: torch.take_along_dim(x, ORDER.view(1, 4, 1, 1), 1),
    "take_along_dim_sorted": lambda x: x.take_along_dim(x[:, :1].argsort(-1), dim=-1),
    "index_two": lambda x: x[:, ORDER[:2], ORDER[2:]],
    "index_apart": lambda x: x[:, ORDER[:3], :, ORDER[:3]].transpose(0, 1),
    "index_bool": lambda x: x[:, torch.tensor([True, False, True, True])],
    "index_last": lambda x: x[..., ORDER],
    "index_matrix": lambda x: x.flatten(2)[:, :, torch.arange(8).view(2, 4)],
    "tensor_split_sections": lambda x: torch.cat(torch.tensor_split(x, (1, 4), 3)[::-1], 3).cumsum(3),
    "hsplit": lambda x: x.flatten(2).hsplit(2)[1],
    "repeat_interleave_counts": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 3]), dim=1, output_size=6),
    "tile": lambda x: x.tile((1, 2, 1, 1)),
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "diag_embed": lambda x: x.mean(2).diag_embed(),
    "diff": lambda x: x.diff(dim=2),
    "trapezoid": lambda x: torch.trapezoid(x, dim=3),
    "trapz_spaced": lambda x: torch.trapz(x, torch.arange(5, dtype=x.dtype).square(), dim=3),
    "cumprod": lambda x: (1 + x / 4).cumprod(2),
    "cummax": lambda x: x.cummax(1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "topk": lambda x: x.topk(2, dim=1).values,
    "sort": lambda x: x.sort(dim=1).values * torch.arange(5, dtype=x.dtype),
    "kthvalue": lambda x: x.kthvalue(2, dim=1).values,
    "median": lambda x: x.median(dim=1).values,
    "max_and_index": lambda x: x.max(1).values + x.max(1).indices,
    "amin": lambda x: x.amin(1),
    "aminmax": lambda x: x.aminmax(dim=1).max - x.aminmax(dim=1).min,
    "minimum": lambda x: torch.minimum(x, x.mean(1, keepdim=True)),
    "min_values": lambda x: x.min(dim=2).values,
    "var_mean": lambda x: torch.cat(torch.var_mean(x, 1), 1),
    "norm_p": lambda x: torch.linalg.vector_norm(x, 3, dim=(1, 2)),
    "clamp_tensor": lambda x: x.clamp(min=x.mean(1, keepdim=True) - 0.1, max=0.3 * torch.ones(5, dtype=x.dtype)),
    "where_number": lambda x: torch.where(x > 0.1, x, -0.5),
    "pow_tensor": lambda x: x.sigmoid() ** (1 + x.roll(1, 1).square()),
    "atan2": lambda x: torch.atan2(x, 1 + x.flip(1).square()),
    "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.flip(1), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), 1 + x.flip(1).square(), value=0.5),
    "nan_to_num": lambda x: torch.nan_to_num(x.log()) * x,
    "hypot": lambda x: torch.hypot(x, x.flip(1) + 2),
    "xlogy": lambda x: torch.xlogy(x, x.square() + 1),
    "fmod": lambda x: torch.fmod(x, 0.7) * x,
    "round": lambda x: x.round() * x,
    "movedim_all": lambda x: x.moveaxis(1, 3).swapdims(1, 2),
    "meshgrid": lambda x: x * torch.meshgrid(torch.arange(6), torch.arange(5), indexing="ij")[0],
    "linspace": lambda x: x + torch.linspace(-1, 1, 5, dtype=x.dtype),
}


def counted(x: Tensor) -> Tensor:
    """Positions from a running count of a mask, as for padded tokens."""
    mask = (x[..., 0] > x.mean((1, 2)).unsqueeze(-1)).long()
    positions = mask.cumsum(1) * mask
    return x * positions.unsqueeze(-1).to(x.dtype) + positions.unsqueeze(-1)


def routed(x: Tensor) -> Tensor:
    """The two largest features weigh four experts, which are powers."""
    weights, experts = x.softmax(-1).topk(2, dim=-1)
    gates = torch.zeros_like(x).scatter(-1, experts, weights)
    powers = torch.stack([x, x.square(), x.sin(), x.tanh()], -1)
    return (gates.unsqueeze(-2) * powers).sum(-1)


def one_hot_gates(x: Tensor) -> Tensor:
    """Only the expert with the largest logit is used."""
    gates = F.one_hot(x.argmax(-1), 4).to(x.dtype)
    return gates * x + x.sin()


def sorted_and_back(x: Tensor) -> Tensor:
    """Sorted along the tokens, changed, and put back by the inverse permutation."""
    y, order = x.sort(1)
    return (y * torch.arange(1, 4, dtype=x.dtype).view(1, 3, 1)).gather(1, order.argsort(1))


def looked_up(x: Tensor) -> Tensor:
    """A table read at integers computed from the data."""
    table = torch.arange(12, dtype=x.dtype).view(4, 3).sin()
    return x.mean(-1, keepdim=True) * F.embedding(x.argmax(-1), table)


LANES: dict[str, Op] = {
    "count": counted,
    "routing": routed,
    "one_hot": one_hot_gates,
    "sort_and_back": sorted_and_back,
    "lookup": looked_up,
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)),
    "comparison_chain": lambda x: x * ((x > 0) & ~(x > 0.5) | (x < -0.2)),
    "all_any": lambda x: x * (x > -1).all(-1, keepdim=True) + (x > 0).any(1, keepdim=True),
    "arange_mask": lambda x: x * (torch.arange(3).unsqueeze(-1) < torch.arange(4)),
    "last_token": lambda x: x[torch.arange(x.shape[0]), (x[..., 0] > 0).long().sum(1).clamp(max=2)],
    "float_mask": lambda x: x * (x.sum(-1, keepdim=True) > 0).float(),
    "int_scale": lambda x: x * x.shape[1] / (x > 0).sum((1, 2), keepdim=True).clamp(min=1),
    "long_division": lambda x: x.gather(-1, (x.argmax(-1, keepdim=True) // 2)),
}


def filled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 1:] = x[..., :-1].sin()
    y[:, 0, 0] += x[:, 0, 1]
    return y + x


def filled_new(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 5, 4)
    y[:, 1:4] = x
    return y.tanh()


def put(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.tensor([2, 0])] = x[:, :2] * 3
    return y


def masked_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = 0.1
    return y * x


def scattered(x: Tensor) -> Tensor:
    return x.scatter_add(-1, x.argsort(-1), x.sin())


def write_through_views(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(y.shape[0], -1)[:, 2:5].mul_(3).add_(1)
    y.transpose(1, 2)[:, 1].neg_()
    return y


def write_chunks(x: Tensor) -> Tensor:
    """Torch takes writes through one of several views only where no gradient flows, as in a mask."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    first, second = mask.chunk(2, -1)
    first.logical_or_(x[..., 1:3] > 0)
    second |= ~first
    mask.unbind(1)[1].logical_not_()
    return x * mask


def write_unsqueezed(x: Tensor) -> Tensor:
    y = x * 2
    y.unsqueeze(1).squeeze(1).select(2, 0).copy_(x[..., 3])
    return y


def write_twice(x: Tensor) -> Tensor:
    y = x.sin()
    view = y[:, 0]
    view *= 2
    y[:, 0] += x[:, 1]
    return torch.cat([y, view.unsqueeze(1)], 1)


def write_buffer(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], 2, 4, dtype=x.dtype)
    out[:, 0] = x[:, 0]
    out[:, 1] = x.sum(1)
    return out


def write_permuted(x: Tensor) -> Tensor:
    y = x.clone()
    y.permute(2, 0, -2)[1] *= 4
    y.narrow(1, -2, 1).sub_(1)
    return y


def write_diagonal(x: Tensor) -> Tensor:
    y = x @ x.mT
    y.diagonal(dim1=1, dim2=2).zero_()
    return y


def write_expanded(x: Tensor) -> Tensor:
    y = x.clone()
    y[:] = x.mean(1, keepdim=True)
    y[:, 1] = torch.tensor(0.5, dtype=x.dtype)
    return y + x


WRITES: dict[str, Op] = {
    "filled": filled,
    "filled_new": filled_new,
    "put": put,
    "masked_write": masked_write,
    "scatter_add": scattered,
    "masked_scatter": lambda x: x.masked_fill(x > 0, 0.2) + x.masked_fill_(x < -1, 2.0),
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, :2].sin(), alpha=2),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([2]), x[:, :1].sin()),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([1]), 0.3),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :, :2].sin(), 2, 1, 3),
    "through_views": write_through_views,
    "chunks": write_chunks,
    "unsqueezed": write_unsqueezed,
    "twice": write_twice,
    "new_buffer": write_buffer,
    "permuted": write_permuted,
    "diagonal": write_diagonal,
    "expanded": write_expanded,
}

INDEXING = (
    *functions("index", IMAGE, PICKED),
    *functions("lane", TOKENS, LANES),
    *functions("write", TOKENS, WRITES),
)
