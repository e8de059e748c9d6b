"""The oracle: curvature by brute force in float64, from torch alone, obviously right and not fast.

Axes: `n` sample, `v` column, `s` weight-sharing position, `g` group, `i`, `o` input, output feature, `c`, `d` outputs.
A column is `S[v, n, *output.shape[1:]]` with the loss weight inside; exact means `Σ_v S_vn S_vnᵀ = ∇² of the loss`.
Every model is run on ONE sample at a time, so whatever a layer sees besides its features is a position of that sample.
Parameters go by their first name in `named_parameters()`; by default all functions answer for the trainable ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Loss = Callable[[Tensor, Tensor], Tensor]
Approx = Literal["expand", "reduce"]
Factors = dict[str, tuple[Tensor, Tensor]]


# Jacobians and loss Hessians


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that require gradients, tied copies once, in `named_parameters()` order."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def per_sample_jacobian(model: nn.Module, names: Iterable[str], x_n: Tensor) -> dict[str, Tensor]:
    """J[c, *θ.shape] = ∂ f(x_n)_c / ∂θ for one sample `x_n` (no batch axis), `c` runs over `output.flatten()`.

    On a copy: torch 2.15's functional_call leaves a module registered under two names with the wrong parameters.
    """
    _require_eval(model)
    model = copy.deepcopy(model)
    everything = {name: p.detach() for name, p in model.named_parameters()}

    def f(chosen: dict[str, Tensor]) -> Tensor:
        parameters = {**everything, **chosen}
        with PlainBatchNorm():
            return torch.func.functional_call(model, parameters, (x_n.unsqueeze(0),), tie_weights=True).flatten()

    names = list(names)
    output, pullback, *_ = torch.func.vjp(f, {name: everything[name] for name in names})
    rows = [pullback(e_c)[0] for e_c in torch.eye(output.numel(), dtype=output.dtype)]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


class PlainBatchNorm(TorchFunctionMode):
    """BatchNorm in eval mode as its formula: torch 2.15's own has a wrong gradient for one sample and cotangents that
    are not contiguous, on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {"weight": None, "bias": None, "training": False, "eps": 1e-5, **(kwargs or {})}
        given |= dict(zip(names, args, strict=False))
        if given["training"]:
            return func(*args, **(kwargs or {}))
        x = given["input"]
        mean, var, weight, bias = (
            None if t is None else t.view(-1, *(1,) * (x.ndim - 2)) for t in (given[name] for name in names[1:5])
        )
        x = (x - mean) / (var + given["eps"]).sqrt()
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


def jacobians(model: nn.Module, x: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """J[n, c, *θ.shape], one sample at a time."""
    names = trainable(model) if names is None else list(names)
    each = [per_sample_jacobian(model, names, x_n) for x_n in x]
    return {name: torch.stack([J_n[name] for J_n in each]) for name in names}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """f[n, *output], one sample at a time."""
    _require_eval(model)
    with torch.no_grad():
        return torch.cat([model(x_n.unsqueeze(0)) for x_n in x])


def loss_hessians(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """H[n, c, d] = ∂²L/∂f_nc∂f_nd of the whole reduced loss L, after checking that no two samples mix."""
    N, D = output.shape[0], output[0].numel()
    jacrev = torch.func.jacrev  # twice backward: torch.func.hessian's forward mode warns of a deprecation
    H = jacrev(jacrev(lambda f: loss(f, target)))(output.detach()).reshape(N, D, N, D)
    blocks = torch.stack([H[n, :, n] for n in range(N)])
    assert torch.equal(torch.block_diag(*blocks), H.reshape(N * D, N * D)), "the loss mixes samples"
    return blocks


def _require_eval(model: nn.Module) -> None:
    assert not any(module.training for module in model.modules()), "the oracle wants model.eval()"


# Columns of the factor


def exact_columns(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """S[v, n, *output] with Σ_v S_vn S_vnᵀ = H_n, from the eigenvectors of H_n; V = elements of one output."""
    eigenvalues, eigenvectors = torch.linalg.eigh(loss_hessians(loss, output, target))  # [n, v], [n, c, v]
    assert eigenvalues.min() > -1e-12, "the loss is not convex in the output"
    S = eigenvectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)
    return S.permute(2, 0, 1).reshape(-1, *output.shape)


def empirical_columns(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """S[0, n, *output] = (∂L/∂f) / √ω, elementwise, and 0 where ω = 0."""
    slope = torch.func.grad(lambda f: loss(f, target))(output.detach())
    omega = term_weights(loss, output, target).expand_as(slope)
    return torch.where(omega > 0, slope / omega.sqrt(), 0.0).unsqueeze(0)


def term_weights(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """ω, broadcastable to the output: what the total loss multiplies each loss term with.

    Cross entropy `Σ_c w_c q_c`, mean divides by D; MSE 1, BCE with logits `weight (1 + (pos_weight - 1) y)`, for
    both mean divides by the number of output elements.
    """
    match loss:
        case nn.CrossEntropyLoss():
            return _cross_entropy_weights(loss, output, target)
        case nn.MSELoss():
            omega = torch.ones_like(output)
        case nn.BCEWithLogitsLoss():
            weight = torch.ones_like(output) if loss.weight is None else loss.weight
            pos_weight = torch.ones_like(output) if loss.pos_weight is None else loss.pos_weight
            omega = weight * (1 + (pos_weight - 1) * target)
        case _:
            raise NotImplementedError(f"term_weights: no definition for {loss}")
    return omega / output.numel() if loss.reduction == "mean" else omega


def _cross_entropy_weights(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Tensor:
    """ω[n, 1, *positions] = Σ_c w_c q_c / D, with q the smoothed target and D what PyTorch's mean divides by."""
    C = output.shape[1]
    w = torch.ones(C, dtype=output.dtype) if loss.weight is None else loss.weight
    w_c = w.reshape(1, C, *[1] * (output.ndim - 2))
    if target.is_floating_point():
        q, kept = target, torch.ones_like(target[:, :1])
        divisor = kept.sum()
    else:
        kept = (target != loss.ignore_index).unsqueeze(1).to(output.dtype)
        q = F.one_hot(target.where(target != loss.ignore_index, 0), C).movedim(-1, 1).to(output.dtype)
        divisor = (kept * w_c * q).sum()
    q = (1 - loss.label_smoothing) * q + loss.label_smoothing / C
    omega = kept * (w_c * q).sum(1, keepdim=True)
    return omega / divisor if loss.reduction == "mean" else omega


# Dense, diagonal and first-order quantities, from Jacobians


def ggn(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, names: Iterable[str] | None = None
) -> dict[tuple[str, str], Tensor]:
    """G[p, q] = Σ_n J_pᵀ H_n J_q `[numel p, numel q]` for every pair of parameters."""
    J = {name: J_p.flatten(2) for name, J_p in jacobians(model, x, names).items()}
    H = loss_hessians(loss, outputs(model, x), y)
    return {(p, q): torch.einsum("nci,ncd,ndj->ij", J[p], H, J[q]) for p in J for q in J}


def ggn_matrix(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """G `[P, P]` over all trainable parameters, each flattened row-major, in `named_parameters()` order."""
    names = trainable(model)
    G = ggn(model, loss, x, y, names)
    return torch.cat([torch.cat([G[p, q] for q in names], dim=1) for p in names])


def ggn_block(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Σ_n Jᵀ H_n J `[numel, numel]` for one parameter, acting on `θ.flatten()`."""
    return ggn(model, loss, x, y, [name])[name, name]


def diag_ggn(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """diag(Σ_n Jᵀ H_n J), in each parameter's shape."""
    H = loss_hessians(loss, outputs(model, x), y)
    return {name: torch.einsum("nc...,ncd,nd...->...", J, H, J) for name, J in jacobians(model, x, names).items()}


def grad(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """∂L/∂θ = Σ_n J_nᵀ ∂L/∂f_n, in each parameter's shape."""
    slope = torch.func.grad(lambda f: loss(f, y))(outputs(model, x)).reshape(len(x), -1)
    return {name: torch.einsum("nc...,nc->...", J, slope) for name, J in jacobians(model, x, names).items()}


def batch_grad(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """g[n, *θ.shape] = J_nᵀ ∂L/∂f_n of the whole reduced loss L."""
    slope = torch.func.grad(lambda f: loss(f, y))(outputs(model, x)).reshape(len(x), -1)
    return {name: torch.einsum("nc...,nc->n...", J, slope) for name, J in jacobians(model, x, names).items()}


def column_gradients(
    model: nn.Module, x: Tensor, columns: Tensor, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """u[v, n, *θ.shape] = J_nᵀ S_vn."""
    return pulled(jacobians(model, x, names), columns)


def pulled(J: dict[str, Tensor], columns: Tensor) -> dict[str, Tensor]:
    """u[v, n, *θ.shape] = J_nᵀ S_vn, from Jacobians J[n, c, *θ.shape]."""
    S = columns.reshape(*columns.shape[:2], -1)
    return {name: torch.einsum("nc...,vnc->vn...", J_p, S) for name, J_p in J.items()}


def diagonal(model: nn.Module, x: Tensor, columns: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Σ_vn (J_nᵀ S_vn)², in each parameter's shape."""
    return {name: u.square().sum((0, 1)) for name, u in column_gradients(model, x, columns, names).items()}


def dense_block(model: nn.Module, x: Tensor, columns: Tensor, name: str) -> Tensor:
    """Σ_vn u_vn u_vnᵀ `[numel, numel]`, u = J_nᵀ S_vn: the KFAC block of a bias, and of a BatchNorm's."""
    return outer(column_gradients(model, x, columns, [name])[name])


def outer(u: Tensor) -> Tensor:
    """Σ_vn u_vn u_vnᵀ `[numel, numel]` of u[v, n, *θ.shape]."""
    u = u.reshape(*u.shape[:2], -1)
    return torch.einsum("vni,vnj->ij", u, u)


def rotated_diagonal(u: Tensor, U_A: Tensor, U_G: Tensor) -> Tensor:
    """Σ_vn (U_Gᵀ u_vn U_A)² `[g, o, i]` of the columns u[v, n, g, o, i], in the bases `[g, i, i]`, `[g, o, o]`."""
    return torch.einsum("vngoi,gop,gij->vngpj", u, U_G, U_A).square().sum((0, 1))


# Kronecker factors


@dataclass(frozen=True)
class Use:
    """A use `y[s, g, o] = Σ_i W[g, o, i] x[s, g, i] (+ b[g, o])` of a weight by one sample; S is `[v, s, g, o]`.

    With `inputs_first` the parameter is Wᵀ, `[i, o]`.
    """

    weight: str
    bias: str | None
    x: Tensor
    S: Tensor
    in_out: bool


@dataclass(frozen=True)
class _Call:
    """A linear or convolution call on real parameters, and the zero `z` that was added to its output."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    z: Tensor

    @property
    def swapped(self) -> bool:
        """Whether the weight is the transpose of a matrix."""
        weight, base = self.arguments["weight"], self.arguments["weight"]._base
        return (
            base is not None and base.ndim == 2 and weight.stride() == base.T.stride() and weight.shape == base.T.shape
        )

    @property
    def parameter(self) -> Tensor:
        """The weight, or that whose transpose it is."""
        weight, base = self.arguments["weight"], self.arguments["weight"]._base
        again = base is not None and weight.stride() == base.stride() and weight.shape == base.shape  # (Wᵀ)ᵀ
        return base if base is not None and (self.swapped or again) else weight


ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.addmm)


def _as_linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A call as one of a layer: x @ W (+ b) of what depends on the data, with a matrix W, is F.linear with Wᵀ."""
    if func is F.linear or func in CONVOLUTIONS:
        return func, {"bias": None, **dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    if func not in PRODUCTS or kwargs:
        return None
    *bias, x, W = args
    if W.ndim != 2 or x.ndim < 2 or not x.requires_grad:
        return None
    return F.linear, {"input": x, "weight": W.T, "bias": bias[0] if bias else None}


class _Recorder(TorchFunctionMode):
    """Adds a zero `z` to the output of each linear and convolution: ∂f/∂z is what arrives there, in-place ops or no."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func is F.multi_head_attention_forward
        ):  # a function in Python: its linear calls are seen by running its body
            with patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **(kwargs or {}))
        y = func(*args, **(kwargs or {}))
        call = _as_linear(func, args, kwargs or {})
        if call is None:
            return y
        function, arguments = call
        z = torch.zeros_like(y, requires_grad=True)
        self.calls.append(_Call(function, {**arguments, "input": arguments["input"].detach().clone()}, z))
        return y + z


def kfac(
    model: nn.Module, x: Tensor, columns: Tensor, approx: Approx = "expand", joint: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) per weight. Expand: `A = 1/(N S_l) Σ_ns x xᵀ`, `G = Σ_vns S Sᵀ`; reduce: the same with x̄, ŝ for x, S.

    Here `x̄ = mean_s x`, `ŝ = Σ_s S`, S_l = 1. A is `[i, i]`, G `[o, o]`, with groups `[g, i, i]`, `[g, o, o]`.
    All uses of a weight are concatenated along `s`. `joint` appends 1 to `x` where one trainable bias belongs to this
    weight alone. The answer holds exactly the trainable weights that reach the output and whose gradient lies wholly in
    their linear and convolution uses (checked in numbers for each sample).
    """
    factors: Factors = {}
    for n, x_n in enumerate(x):
        for name, (x_sgi, S_vsgo) in _positions(model, x_n, columns[:, n], joint).items():
            A, G = _kronecker_terms(x_sgi, S_vsgo, approx)
            A_sum, G_sum = factors.get(name, (torch.zeros_like(A), torch.zeros_like(G)))
            factors[name] = (A_sum + A / x.shape[0], G_sum + G)
    ungrouped = {name: (A.squeeze(0), G.squeeze(0)) for name, (A, G) in factors.items()}
    return {name: ungrouped[name] for name in trainable(model) if name in ungrouped}


def kronecker_block(A: Tensor, G: Tensor, in_out: bool = False) -> Tensor:
    """G ⊗ A, for groups blockdiag_g(G_g ⊗ A_g): acts on `W.flatten()`, for a joint pair on `[W | b].flatten()`.

    With `inputs_first` A ⊗ G: acts on a matrix `[i, o]`, and for a joint pair on that with b below it.
    """
    if in_out:
        return torch.kron(A, G)
    if A.ndim == 2:
        return torch.kron(G, A)
    return torch.block_diag(*[torch.kron(G_g, A_g) for G_g, A_g in zip(G, A, strict=True)])


def _kronecker_terms(x: Tensor, S: Tensor, approx: Approx) -> tuple[Tensor, Tensor]:
    """One sample's summand: `x[s, g, i]`, `S[v, s, g, o]` -> A `[g, i, i]`, G `[g, o, o]`."""
    if approx == "reduce":
        return _kronecker_terms(x.mean(0, keepdim=True), S.sum(1, keepdim=True), "expand")
    return torch.einsum("sgi,sgj->gij", x, x) / x.shape[0], torch.einsum("vsgo,vsgp->gop", S, S)


def _positions(model: nn.Module, x_n: Tensor, S_n: Tensor, joint: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """x[s, g, i], S[v, s, g, o] of each weight for one sample, all uses concatenated; x ends in 1 if a bias joins."""
    all_uses, gradients = uses(model, x_n, S_n)
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys(use.weight for use in all_uses):
        mine = [use for use in all_uses if use.weight == name]
        if len({use.in_out for use in mine}) > 1:
            continue
        x, S = torch.cat([use.x for use in mine]), torch.cat([use.S for use in mine], dim=1)
        product = "vsgo,sgi->vgio" if mine[0].in_out else "vsgo,sgi->vgoi"
        if not _same(torch.einsum(product, S, x).flatten(1), gradients[name].flatten(1)):
            continue  # this weight is also consumed in another form
        bias = mine[0].bias if len({use.bias for use in mine}) == 1 else None
        if joint and bias is not None and _same(S.sum(1).flatten(1), gradients[bias].flatten(1)):
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        result[name] = (x, S)
    return result


def in_out(model: nn.Module, x: Tensor) -> set[str]:
    """The weights that lie as `[i, o]`."""
    found, _ = uses(model, x[0], torch.zeros_like(outputs(model, x[:1])))
    return {use.weight for use in found if use.in_out}


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-9, atol=1e-11)


def uses(model: nn.Module, x_n: Tensor, S_n: Tensor) -> tuple[list[Use], dict[str, Tensor]]:
    """One sample's uses of trainable weights that reach the output, and `J_nᵀ S_vn` `[v, *θ.shape]` per parameter."""
    _require_eval(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    name_of = {id(p): name for name, p in parameters.items()}
    with _Recorder() as recorder, PlainBatchNorm(), torch.enable_grad():
        seen = x_n.clone().requires_grad_(x_n.is_floating_point()).unsqueeze(0).clone()
        output = model(seen)
    calls = [call for call in recorder.calls if id(call.parameter) in name_of]
    wanted = [call.z for call in calls] + list(parameters.values())
    pulled = _pull(output, wanted, S_n)  # one [v, ...] for each of `wanted`
    found = [
        Use(
            weight=name_of[id(call.parameter)],
            bias=name_of.get(id(call.arguments["bias"])),
            x=_unfolded_input(call),
            S=torch.stack([_split_groups(_features_last(call, S_v), call) for S_v in S_z]),
            in_out=call.swapped,
        )
        for call, S_z in zip(calls, pulled, strict=False)
        if S_z is not None
    ]
    gradients = dict(zip(parameters, pulled[len(calls) :], strict=True))
    return found, {name: u for name, u in gradients.items() if u is not None}


def _pull(output: Tensor, wanted: list[Tensor], S_n: Tensor) -> list[Tensor | None]:
    """(∂f/∂t)ᵀ S_vn `[v, *t.shape]` for each tensor t of `wanted`, None where t does not reach the output."""
    columns = [
        torch.autograd.grad(output, wanted, S_v.unsqueeze(0), retain_graph=True, allow_unused=True) for S_v in S_n
    ]
    by_tensor = zip(*columns, strict=True)
    return [None if ts[0] is None else torch.stack([t for t in ts if t is not None]) for ts in by_tensor]


def _unfolded_input(call: _Call) -> Tensor:
    """x[s, g, i]: what the layer itself answers to the weight that is 1 at input entry `i` and 0 elsewhere, no bias."""
    weight = call.arguments["weight"]
    entries: list[Tensor] = []
    for i in range(weight[0].numel()):
        one_hot = torch.zeros_like(weight).flatten(1)
        one_hot[:, i] = 1
        y = call.function(**{**call.arguments, "weight": one_hot.view_as(weight), "bias": None})
        entries.append(_split_groups(_features_last(call, y), call)[:, :, 0])  # all o of a group answer the same
    return torch.stack(entries, dim=-1)


def _features_last(call: _Call, y: Tensor) -> Tensor:
    """y -> [s, O], whatever axes the layer's output has."""
    if call.function in CONVOLUTIONS:
        assert y.ndim == call.arguments["weight"].ndim, "a convolution without a batch axis"
        y = y.movedim(1, -1)
    return y.reshape(-1, y.shape[-1])


def _split_groups(y: Tensor, call: _Call) -> Tensor:
    """[s, O] -> [s, g, o]."""
    return y.unflatten(1, (call.arguments.get("groups", 1), -1))


# The loss Hessian


def diag_hessian(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, n: int | None = None) -> dict[str, Tensor]:
    """diag ∂²L/∂θ² by torch.func.hessian of the whole loss, or of sample n's part of it: the other outputs are held."""
    _require_eval(model)
    model = copy.deepcopy(model)
    everything = {name: p.detach() for name, p in model.named_parameters()}
    held = outputs(model, x)

    def value(chosen: dict[str, Tensor]) -> Tensor:
        with PlainBatchNorm():
            f = torch.func.functional_call(model, {**everything, **chosen}, (x,), tie_weights=True)
        return loss(f if n is None else torch.cat([held[:n], f[n : n + 1], held[n + 1 :]]), y)

    found: dict[str, Tensor] = {}
    for name in trainable(model):
        p = everything[name]
        jacrev = torch.func.jacrev
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            H = jacrev(jacrev(lambda t, name=name, p=p: value({name: t.view_as(p)})))(p.flatten())
        found[name] = H.diagonal().view_as(p)
    return found


# KFRA's recursion


def kfra(model: nn.Module, x: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """The block `[numel, numel]` of each parameter, from exact `columns`, over the nodes of a trace by torch.fx.

    G(f) = Σ_vn S_vn S_vnᵀ; G(v) = 1/N Σ_n J_nᵀ G(u) J_n with u the first node that all paths from v to the output pass
    and J_n = ∂u_n/∂v_n. A weight has (Σ_s G[s, s]) ⊗ A, anything else 1/N Σ_n J_nᵀ G J_n; uses add. No groups.
    """
    walk, factors, swapped = _Recursion(model, x, columns), kfac(model, x, columns), in_out(model, x)
    name_of = {id(p): name for name, p in model.named_parameters()}
    blocks: dict[str, Tensor] = {}
    for node in walk.nodes:
        for key, p in walk.held(node).items():
            name = name_of[id(p)]
            if name in factors:
                A, o = factors[name][0], len(factors[name][1])
                last = not isinstance(walk.module(node), nn.Conv1d | nn.Conv2d | nn.Conv3d)  # the features of y
                ends = node.users if name in swapped else [node]  # of W itself each x @ W
                block = kronecker_block(
                    A, sum_of_positions([walk.matrix(end) for end in ends], o, last), name in swapped
                )
            else:
                J = walk.of_parameter(node, key, p)
                block = torch.einsum("nai,ab,nbj->ij", J, walk.matrix(node), J) / len(x)
            blocks[name] = blocks.get(name, 0) + block
    return {name: block.detach() for name, block in blocks.items()}


def sum_of_positions(Gs: list[Tensor], o: int, last: bool) -> Tensor:
    """Σ_s G[s, s] `[o, o]` over the positions of a layer's outputs, whose features are last or first; layers add."""
    s = len(Gs[0]) // o
    if last:
        return torch.stack([torch.einsum("sosp->op", G.view(s, o, s, o)) for G in Gs]).sum(0)
    return torch.stack([torch.einsum("osps->op", G.view(o, s, o, s)) for G in Gs]).sum(0)


class _Recursion:
    """G at the nodes of a trace, by definition; `values[n]` are those of sample n."""

    def __init__(self, model: nn.Module, x: Tensor, columns: Tensor) -> None:
        self.model, self.gm = model, fx.symbolic_trace(model)
        self.nodes = [node for node in self.gm.graph.nodes if node.op not in ("placeholder", "output")]
        self.values = [self._run(x_n.unsqueeze(0)) for x_n in x]
        S = columns.reshape(-1, columns[0, 0].numel())
        self.matrices: dict[fx.Node, Tensor] = {self.nodes[-1]: S.T @ S}

    def _run(self, x: Tensor) -> dict[fx.Node, Any]:
        run = fx.Interpreter(self.gm, garbage_collect_values=False)
        with torch.no_grad():
            run.run(x)
        return dict(run.env)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def held(self, node: fx.Node) -> dict[str, Tensor]:
        """The parameters that a node holds itself."""
        if node.op == "get_attr":
            return {"": self.model.get_parameter(str(node.target))}
        module = self.module(node)
        return {} if module is None else dict(module.named_parameters())

    def matrix(self, node: fx.Node) -> Tensor:
        """G `[d, d]`."""
        if node not in self.matrices:
            u = next(u for u in self.nodes if u is not node and self._passed(node, u))
            G, J = self.matrix(u), torch.stack([self._jacobian(node, u, values) for values in self.values])
            self.matrices[node] = torch.einsum("nai,ab,nbj->ij", J, G, J) / len(J)
        return self.matrices[node]

    def _passed(self, v: fx.Node, u: fx.Node) -> bool:
        """Whether v reaches the output, and all paths from it pass u."""
        seen, ahead = {v}, [v]
        while ahead:
            for reader in ahead.pop().users:
                if reader is not u and reader not in seen:
                    seen.add(reader)
                    ahead.append(reader)
        return self.nodes[-1] not in seen and bool(v.users)

    def _jacobian(self, v: fx.Node, u: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
        """∂u/∂v of one sample, `[entries of u, entries of v]`."""

        def of(t: Tensor) -> Tensor:
            found: dict[fx.Node, Any] = {v: t.view_as(values[v])}
            for node in self.nodes[self.nodes.index(v) + 1 :]:
                if any(x in found for x in node.all_input_nodes):
                    run = fx.Interpreter(self.gm, garbage_collect_values=False)
                    run.env = {**values, **found}
                    found[node] = run.run_node(node)
            return found[u].flatten()

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jacrev(of)(values[v].flatten())

    def of_parameter(self, node: fx.Node, key: str, p: Tensor) -> Tensor:
        """∂y_n/∂θ of a parameter that a node holds: `[n, entries of y, numel]`."""
        if not key:
            return torch.eye(p.numel(), dtype=p.dtype).expand(len(self.values), -1, -1)
        module = self.module(node)
        assert module is not None

        def of(t: Tensor, values: dict[fx.Node, Any]) -> Tensor:
            inputs = tuple(values[x] for x in node.all_input_nodes)
            return torch.func.functional_call(module, {key: t.view_as(p)}, inputs).flatten()

        return torch.stack([torch.func.jacrev(of)(p.detach().flatten(), values) for values in self.values])
