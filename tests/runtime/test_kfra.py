"""KFRA against BackPACK on sequential networks, and against the recursion by hand where there are residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import samples
import torch
from peers import assert_close, peer
from torch import Tensor, nn

import fxcurv


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def sigmoid_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h + self.inner(h).tanh())


def seeded(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    model = samples.seeded(make, "kfra")
    return model, samples.normal((5, 4), torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_type", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("make", [tanh_net, sigmoid_net])
def test_sequential_networks_agree_with_backpack(
    make: Callable[[], nn.Module], loss_type: type[nn.Module], reduction: str
) -> None:
    backpack: Any = peer("backpack")
    from backpack.extensions import KFRA

    model, x, y = seeded(make)
    target = y if loss_type is nn.CrossEntropyLoss else samples.normal((5, 3), torch.Generator().manual_seed(1))
    loss = loss_type(reduction=reduction)
    blocks = fxcurv.compile(model, loss, "kfra")(x, target)["kfra"]
    theirs, their_loss = backpack.extend(seeded(make)[0]), backpack.extend(loss_type(reduction=reduction))
    torch.set_default_dtype(torch.float64)  # in which BackPACK's Hessian of MSELoss would not be
    try:
        with backpack.backpack(KFRA()):
            their_loss(theirs(x), target).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in theirs.named_parameters():
        factors = p.kfra
        expected = factors[0] if len(factors) == 1 else torch.kron(*(f.contiguous() for f in factors))
        assert_close(blocks[name].dense(), expected)


def mean_pulled(G: Tensor, J: Tensor) -> Tensor:
    """1/N Σ_n J_nᵀ G J_n."""
    return torch.einsum("nij,ik,nkl->jl", J, G, J) / len(J)


def test_a_residual_block_is_one_step() -> None:
    """Inside of it Jacobians are exact for each sample; the average is taken at its ends."""
    model, x, y = seeded(Residual)
    loss = nn.CrossEntropyLoss()
    blocks = fxcurv.compile(model, loss, "kfra")(x, y)["kfra"]
    net: Any = model
    output = reference.outputs(model, x)
    G_head = reference.loss_hessians(loss, output, y).sum(0)
    with torch.no_grad():
        z = net.first(x)
        h = z.tanh()
        inner = net.inner(h)
        D_z, D_inner = (torch.diag_embed(1 - t.tanh().square()) for t in (z, inner))
        G_sum = net.head.weight.T @ G_head @ net.head.weight
        G_tanh = G_sum
        G_inner = mean_pulled(G_tanh, D_inner)
        J_block = torch.eye(4).double() + D_inner @ net.inner.weight
        G_first = mean_pulled(mean_pulled(G_sum, J_block), D_z)
    for name, G in (("head", G_head), ("inner", G_inner), ("first", G_first)):
        assert_close(blocks[f"{name}.weight"].G, G)
        assert_close(blocks[f"{name}.bias"].dense(), G)
    assert_close(blocks["first.weight"].A, x.T @ x / 5)


@pytest.mark.parametrize("name", ["conv2d.groups", "norm.2d", "free.additive", "linear.tokens", "conv2d.everything"])
def test_one_sample_has_no_average(name: str) -> None:
    """Of a batch of one, G is exact: blocks of parameters without a Kronecker form are the GGN's, traces are KFLR's."""
    row = samples.find(name)
    model, loss, x, y = row.build(), row.loss(), samples.inputs(row, 1), samples.targets(row, 1)
    result = fxcurv.compile(model, loss, ["kfra", "kflr"])(x, y)
    for parameter, block in result["kfra"].items():
        assert_close(block.dense(), result["kflr"][parameter].dense())


def test_it_is_refused_without_a_graph() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x).tanh()
            return self.head(h - h.mean(0))

    model, x, y = seeded(Centred)
    with pytest.raises(fxcurv.UnsupportedError, match=r"recursion over the nodes of a graph.*; ask for kflr"):
        fxcurv.compile(model, quantities="kfra", on_unsupported="fallback")(x, y)


class Squared(nn.Module):
    """x @ f(W) with W as an operand."""

    def __init__(self, of: Callable[[Tensor], Tensor], W: Tensor) -> None:
        super().__init__()
        self.W, self.of, self.head = nn.Parameter(W), of, nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.of(self.W)).tanh())


def test_what_is_computed_from_a_parameter_alone_is_passed_like_any_node() -> None:
    """The block of W in x @ (W W) is Jᵀ B J, with B that of V = W W and J = ∂V/∂W."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        W, x = torch.randn(3, 3).double(), torch.randn(4, 3).double()
        squared, plain = Squared(lambda W: W @ W, W), Squared(lambda V: 1.0 * V, W @ W)
    plain.head.load_state_dict(squared.head.state_dict())
    blocks = [
        fxcurv.compile(m.eval(), quantities="kfra")(x, torch.tensor([0, 1, 0, 1]))["kfra"]["W"]
        for m in (squared, plain)
    ]
    J: Any = torch.func.jacrev(lambda W: W @ W)(W)
    J = J.reshape(9, 9)
    torch.testing.assert_close(blocks[0].dense(), J.T @ blocks[1].dense() @ J, rtol=1e-10, atol=1e-12)
