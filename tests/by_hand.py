"""Quantities from per-sample gradients, Jacobians and loss Hessians, and checks of blocks in eigenbases."""

from __future__ import annotations

from typing import Any, Literal

import reference
import torch
from comparison import assert_close
from torch import Tensor, nn

import fxcurv

__all__ = ["QUANTITIES", "Approx", "by_hand", "check", "check_foof"]


FIRST_ORDER = ("batch_grad", "batch_l2", "batch_dot", "sum_grad_squared", "variance")


SECOND_ORDER = ("batch_diag_ggn", "sqrt_ggn", "ggn_block", "ggn_gram")


QUANTITIES = (*FIRST_ORDER, *SECOND_ORDER, "jacobian")


def by_hand(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """Every quantity of every parameter, from per-sample gradients, Jacobians and loss Hessians."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in QUANTITIES}
    H = reference.loss_hessians(loss, reference.outputs(model, x), y)
    J, N = reference.jacobians(model, x), len(x)
    for name, g in reference.batch_grad(model, loss, x, y).items():
        flat = g.flatten(1)
        found["batch_grad"][name] = g
        found["batch_l2"][name] = flat.square().sum(1)
        found["batch_dot"][name] = flat @ flat.T
        found["sum_grad_squared"][name] = g.square().sum(0)
        found["variance"][name] = g.var(0, correction=0) if N > 1 else torch.zeros_like(g[0])
        found["jacobian"][name] = J[name]
        found["batch_diag_ggn"][name] = torch.einsum("nc...,ncd,nd...->n...", J[name], H, J[name])
        columns = J[name].flatten(2)
        found["ggn_block"][name] = torch.einsum("nci,ncd,ndj->ij", columns, H, columns)
    return found


def grouped(t: Tensor) -> Tensor:
    return t if t.ndim == 3 else t.unsqueeze(0)


def check(model: nn.Module, x: Tensor, result: Any, columns: Tensor, *, approx: Approx, joint: bool) -> None:
    """Bases diagonalize the oracle's factors, eigenvalues are the oracle's in them; the trace is the exact block's."""
    factors = reference.kfac(model, x, columns, approx, joint)
    u, swapped = reference.column_gradients(model, x, columns), reference.in_out(model, x)
    u |= {name: u[name].mT for name in swapped}
    blocks = {name: block for name, block in result.items() if block.parameters[0] == name}
    assert {name for name, block in blocks.items() if isinstance(block, fxcurv.Eigenbasis)} == set(factors)
    for name, (A, G) in factors.items():
        block = blocks[name]
        U_A, U_G = block.input_vectors, block.output_vectors
        for U, factor in ((U_A, grouped(A)), (U_G, grouped(G))):
            assert_close(U.mT @ U, torch.eye(U.shape[-1]).to(U).expand_as(U), f"{name}: a basis")
            diagonal = U.mT @ factor @ U
            assert_close(torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), diagonal, f"{name}: eigenvectors")
        J = torch.cat([u[p].reshape(*columns.shape[:2], U_G.shape[0], U_G.shape[1], -1) for p in block.parameters], -1)
        expected = reference.rotated_diagonal(J, U_A, U_G)
        assert_close(block.values, expected, f"{name}: eigenvalues")
        basis, values = reference.kronecker_block(U_A, U_G), expected
        if name in swapped:
            basis, values = reference.kronecker_block(U_A[0], U_G[0], in_out=True), expected.mT
        assert_close(block.dense(), basis * values.flatten() @ basis.T, f"{name}: matrix")
        exact = J.square().sum()
        assert abs(block.trace() - exact) <= 1e-10 * exact, f"{name}: trace"
        assert_close(block.trace(), block.dense().trace(), f"{name}: trace of the matrix")


def check_foof(result: Any, factors: Any) -> None:
    for name, block in result.items():
        if isinstance(block, fxcurv.Kronecker):
            A, G = factors[block.parameters[0]]
            assert_close(block.A, A, f"A of {name}")
            assert_close(block.G, torch.eye(G.shape[-1]).to(G).expand_as(G), f"G of {name}")
        else:
            assert torch.equal(block.values, torch.ones_like(block.values))


Approx = Literal["expand", "reduce"]
