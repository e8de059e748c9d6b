"""Blocks as operators: every product, diagonal and trace equals that of the dense matrix."""

from __future__ import annotations

import pytest
import torch

import fxcurv

G = torch.Generator().manual_seed(0)


def psd(*shape: int) -> torch.Tensor:
    root = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=G)
    return root @ root.mT


BLOCKS = {
    "diagonal": fxcurv.Diagonal((2, 3), torch.rand(2, 3, dtype=torch.float64, generator=G)),
    "dense": fxcurv.Dense((6,), psd(6)),
    "kronecker": fxcurv.Kronecker((4, 2, 3), psd(6), psd(4)),
    "grouped": fxcurv.Kronecker((4, 3), psd(2, 3), psd(2, 2)),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_agrees_with_its_dense_matrix(block: fxcurv.Block) -> None:
    matrix = block.dense()
    assert matrix.shape == (block.numel, block.numel)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(block.diag(), matrix.diagonal().reshape(block.shape))
    torch.testing.assert_close(block.trace(), matrix.trace())
    v = torch.randn(block.shape, dtype=torch.float64, generator=G)
    torch.testing.assert_close(block.mv(v), (matrix @ v.flatten()).reshape(block.shape))
    torch.testing.assert_close(block.mv(v.flatten()), matrix @ v.flatten())
    with pytest.raises(fxcurv.InputError, match=f"give {block.numel} entries"):
        block.mv(v.flatten()[1:])


def test_a_grouped_block_is_block_diagonal() -> None:
    block = BLOCKS["grouped"]
    assert isinstance(block, fxcurv.Kronecker)
    expected = torch.block_diag(*(torch.kron(g, a) for g, a in zip(block.G, block.A, strict=True)))
    torch.testing.assert_close(block.dense(), expected)
