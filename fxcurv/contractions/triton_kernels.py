"""The Triton kernels; `fxcurv.contractions.kernels` imports this file on first use, where Triton is installed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["blocks_for", "splits_for", "sum_of_squared_products", "tiles"]


@triton.jit
def tiles(inputs: tl.tuple, out: tl.tensor, sizes: tl.tuple, strides: tl.tuple, OPTIONS: tl.constexpr):
    """out[split,g,o,i] = Σ_vn (Σ_s S[v,n,s,g,o] x[n,s,g,i])², over the pairs (v,n) of one split, for a tile of (o,i).

    Each program owns its tile of `out`: there are no atomic additions, so that equal inputs give equal bits.
    """
    V, N, P, G, O, I, splits = sizes
    S, x = inputs
    S_strides, x_strides = strides
    BLOCK_O: tl.constexpr = OPTIONS[0]
    BLOCK_I: tl.constexpr = OPTIONS[1]
    BLOCK_S: tl.constexpr = OPTIONS[2]
    PRECISION: tl.constexpr = OPTIONS[3]
    split = tl.program_id(1)
    tile = tl.program_id(0)
    across = tl.cdiv(I, BLOCK_I)
    group = (tile // across // tl.cdiv(O, BLOCK_O)).to(tl.int64)
    o = (tile // across % tl.cdiv(O, BLOCK_O) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    i = (tile % across * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    S += group * S_strides[3] + o[:, None] * S_strides[4] + s[None, :] * S_strides[2]
    x += group * x_strides[2] + s[:, None] * x_strides[1] + i[None, :] * x_strides[3]
    total = tl.full((BLOCK_O, BLOCK_I), 0, tl.float32)
    share = tl.cdiv(V * N, splits)
    for pair in range(split * share, tl.minimum(split * share + share, V * N)):  # v runs faster: x[n] stays in cache
        n = tl.cast(pair // V, tl.int64)
        v = tl.cast(pair % V, tl.int64)
        left = S + v * S_strides[0] + n * S_strides[1]
        right = x + n * x_strides[0]
        product = tl.full((BLOCK_O, BLOCK_I), 0, tl.float32)
        for start in range(0, P, BLOCK_S):
            first = tl.cast(start, tl.int64)
            inside = s + first < P
            a = tl.load(left + first * S_strides[2], mask=(o < O)[:, None] & inside[None, :], other=0)
            b = tl.load(right + first * x_strides[1], mask=inside[:, None] & (i < I)[None, :], other=0)
            product = tl.dot(a, b, product, input_precision=PRECISION)
        total += product * product
    place = ((split * G + group) * O + o[:, None]) * I + i[None, :]
    tl.store(out + place, total, mask=(o < O)[:, None] & (i < I)[None, :])


@torch.library.custom_op("fxcurv::sum_of_squared_products", mutates_args=())
def sum_of_squared_products(S: Tensor, x: Tensor) -> Tensor:
    """D[g,o,i] = Σ_vn (Σ_s S[v,n,s,g,o] x[n,s,g,i])² in float32, for inputs of one type no wider."""
    (v, n, s, g, o), i = S.shape, x.shape[-1]
    blocks, warps = blocks_for(o, i, s)
    tiles_in_all = g * triton.cdiv(o, blocks[0]) * triton.cdiv(i, blocks[1])
    splits = splits_for(tiles_in_all, v * n, S.device)
    out = S.new_empty(splits, g, o, i, dtype=torch.float32)
    launch: Any = tiles[(tiles_in_all, splits)]
    sizes = (v, n, s, g, o, i, splits)
    options = (*blocks, _precision(S.dtype))
    launch((S, x), out, sizes, (S.stride(), x.stride()), OPTIONS=options, num_warps=warps)
    return out.sum(0)


@sum_of_squared_products.register_fake
def _(S: Tensor, x: Tensor) -> Tensor:
    return S.new_empty(*S.shape[3:], x.shape[-1], dtype=torch.float32)


def blocks_for(outputs: int, inputs: int, positions: int) -> tuple[tuple[int, int, int], int]:
    """The tile's sides along o, i and s, and the number of warps: from sizes alone, so results are reproducible."""
    o, i = (min(64, max(16, triton.next_power_of_2(size))) for size in (outputs, inputs))
    s = min(32, max(16, triton.next_power_of_2(positions)))
    return (o, i, s), 8 if o * i >= 4096 else 4


def splits_for(tiles_in_all: int, pairs: int, device: torch.device) -> int:
    """Number of programs to split the pairs (v,n) of each tile into, for two programs per multiprocessor."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    share = triton.cdiv(pairs, max(1, min(pairs, triton.cdiv(programs, tiles_in_all))))
    return triton.cdiv(pairs, share)  # no split without a pair


def _precision(dtype: torch.dtype) -> str:
    """Triton's precision of products, from torch's setting for float32; narrower types have only one."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
