"""Rows: a library and a quantity, and how the one computes the other."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import fxcurv

Result = Mapping[str, Any]  # parameter name -> what the library computed for it


@dataclass(frozen=True)
class Forecast:
    """What a library expects of a run."""

    seconds: float
    peak_bytes: float


@dataclass(frozen=True)
class Computation:
    """A quantity of one model: `run(x, y)` is done for every batch, `compile(x)` once, before the first."""

    run: Callable[[Tensor, Tensor], Result]
    compile: Callable[[Tensor], object] | None = None
    forecast: Callable[[Tensor], Forecast | None] | None = None


Prepare = Callable[[nn.Module], Computation]


@dataclass(frozen=True)
class Row:
    """One line of the table. `cheaper` is the row of the same library that does less: where it is over the limit, this
    one need not be tried."""

    library: str
    quantity: str
    prepare: Prepare
    note: str = ""
    cheaper: str = ""

    @property
    def name(self) -> str:
        return f"{self.library} {self.quantity}"


# torch ------------------------------------------------------------------------------------------------------------


def forward(model: nn.Module) -> Computation:
    """The floor: the model alone, which is no result for any parameter."""

    def run(x: Tensor, y: Tensor) -> Result:
        with torch.no_grad():
            model(x)
        return {}

    return Computation(run)


def gradient(model: nn.Module) -> Computation:
    loss, parameters = nn.CrossEntropyLoss(), dict(model.named_parameters())

    def run(x: Tensor, y: Tensor) -> Result:
        gradients = torch.autograd.grad(loss(model(x), y), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    return Computation(run)


def per_sample(squared: bool) -> Prepare:
    """The gradient of every sample by torch.func, or the sum of their squares."""

    def prepare(model: nn.Module) -> Computation:
        loss = nn.CrossEntropyLoss()
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, (parameters, buffers), (x.unsqueeze(0),)), y.unsqueeze(0))

        gradients = vmap(grad(loss_of), in_dims=(None, 0, 0))

        def run(x: Tensor, y: Tensor) -> Result:
            result = gradients(parameters, x, y)
            return {name: g.square().sum(0) for name, g in result.items()} if squared else result

        return Computation(run)

    return prepare


def contracted_jacobians(model: nn.Module) -> Computation:
    """The tangent kernel `[N, N, C, C]` of a batch with itself, as torch.func's tutorial has it: by Jacobians."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def output_of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x.unsqueeze(0),)).flatten()

    jacobians = vmap(jacrev(output_of), in_dims=(None, 0))

    def run(x: Tensor, y: Tensor) -> Result:
        each = (J.flatten(2) for J in jacobians(parameters, x).values())
        return dict.fromkeys(parameters, sum(torch.einsum("ncp,mdp->nmcd", J, J) for J in each))

    return Computation(run)


# fxcurv -----------------------------------------------------------------------------------------------------------


def fxcurv_quantity(quantity: str | fxcurv.KFAC | fxcurv.DiagGGN, dense: bool = False) -> Prepare:
    """A quantity by its name or as an object; `dense`: with every Kronecker factor as a matrix."""

    def prepare(model: nn.Module) -> Computation:
        compiled = fxcurv.compile(model, loss=nn.CrossEntropyLoss(), quantities=[quantity])

        def run(x: Tensor, y: Tensor) -> Result:
            (values,) = compiled(x, y).values()
            return {name: factors(value) for name, value in values.items()} if dense else dict(values)

        return Computation(run, compiled.prepare, partial(forecast, compiled))

    return prepare


def tangent_kernel(model: nn.Module) -> Computation:
    """`[N, N, C, C]` of a batch with itself."""
    kernel = fxcurv.NTK(model)
    return Computation(lambda x, y: dict.fromkeys(trainable(model), kernel(x)), kernel.compiled.prepare)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def vector(model: nn.Module) -> Tensor:
    """What a matrix is multiplied with, the same for each library."""
    parameters, generator = [p for p in model.parameters() if p.requires_grad], torch.Generator().manual_seed(0)
    return torch.randn(sum(p.numel() for p in parameters), generator=generator).to(parameters[0].device)


def ggn_product(model: nn.Module) -> Computation:
    v = vector(model)

    def run(x: Tensor, y: Tensor) -> Result:
        operator = fxcurv.ggn_operator(model, nn.CrossEntropyLoss(), [(x, y)])
        return dict.fromkeys(trainable(model), operator @ v)

    return Computation(run)


def factors(block: Any) -> object:
    """The factors A and G as matrices, whatever form the block holds them in; a block without them as it is."""
    try:
        return block.A, block.G
    except AttributeError:
        return block


def forecast(compiled: fxcurv.Compiled, x: Tensor) -> Forecast | None:
    """What the compiled object expects, where it can tell."""
    explain = getattr(compiled, "explain", None)
    if explain is None:
        return None
    told = explain(x)
    return Forecast(float(told.seconds), float(told.peak_bytes))


# BackPACK and curvlinops ------------------------------------------------------------------------------------------


def backpack_extension(extension: str, field: str) -> Prepare:
    """BackPACK's extension; where a model is not made of its modules alone, through its converter."""

    def prepare(model: nn.Module) -> Computation:
        backpack: Any = importlib.import_module("backpack")
        extensions: Any = importlib.import_module("backpack.extensions")
        names = {id(p): name for name, p in model.named_parameters()}
        extended = backpack.extend(model, use_converter=not isinstance(model, nn.Sequential))
        parameters = {names[id(p)]: p for p in extended.parameters()}
        loss = backpack.extend(nn.CrossEntropyLoss())

        def run(x: Tensor, y: Tensor) -> Result:
            with backpack.backpack(getattr(extensions, extension)()):
                loss(extended(x), y).backward()
            result = {name: getattr(p, field) for name, p in parameters.items() if hasattr(p, field)}
            for p in parameters.values():
                p.grad = None
                if hasattr(p, field):
                    delattr(p, field)
            return result

        return Computation(run)

    return prepare


def curvlinops_kfac(fisher: str, corrected: bool = False) -> Prepare:
    """The Kronecker factors of curvlinops, for the parameters of Linear and Conv2d: it refuses all others.

    With `corrected`, EKFAC: their eigenvectors, and the diagonal in these.
    """

    def prepare(model: nn.Module) -> Computation:
        curvlinops: Any = importlib.import_module("curvlinops")
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        supported = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        parameters = {name: p for name, p in model.named_parameters() if id(p) in supported}

        def run(x: Tensor, y: Tensor) -> Result:
            kind = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
            operator = kind(
                model,
                nn.CrossEntropyLoss(),
                list(parameters.values()),
                [(x, y)],
                fisher_type=curvlinops.FisherType(fisher),
                check_deterministic=False,
                num_data=len(x),
                num_per_example_loss_terms=y[0].numel(),
            )
            operator.compute_kronecker_factors()
            if corrected:
                operator.compute_eigenvalue_correction()
            return dict.fromkeys(parameters, operator)

        return Computation(run)

    return prepare


def curvlinops_ggn_product(model: nn.Module) -> Computation:
    curvlinops: Any = importlib.import_module("curvlinops")
    v, parameters = vector(model), [p for p in model.parameters() if p.requires_grad]

    def run(x: Tensor, y: Tensor) -> Result:
        data, loss = [(x, y)], nn.CrossEntropyLoss()
        operator = curvlinops.GGNLinearOperator(
            model, loss, parameters, data, check_deterministic=False, num_data=len(x)
        )
        return dict.fromkeys(trainable(model), operator @ v)

    return Computation(run)


# The table --------------------------------------------------------------------------------------------------------

FORWARD = Row("torch", "forward", forward, "without graph")
GRADIENT = Row("torch", "gradient", gradient)
CHEAPER = {"kflr": "kfac", "diag_ggn": "diag_ggn_mc"}
"""Exact columns, and the sampled ones that are fewer."""
PAIRED = "and the gradient; conv neither expand nor reduce"
LAYERS = "Linear and Conv2d only"

MODULES = {"backpack": "backpack.extensions", "curvlinops": "curvlinops"}
"""What to import for the peers."""


SAME = {
    "forward": "grad",
    "gradient": "grad",
    "KFAC": "kfac",
    "KFAC mc": "kfac",
    "KFLR": "kflr",
    "KFAC type-2": "kflr",
    "KFAC empirical": "kfac_empirical",
    "DiagGGNExact": "diag_ggn",
    "DiagGGNMC": "diag_ggn_mc",
    "BatchGrad": "batch_grad",
    "per-sample grad": "batch_grad",
    "SumGradSquared": "sum_grad_squared",
    "BatchL2Grad": "batch_l2",
    "Variance": "variance",
    "BatchDiagGGNMC": "batch_diag_ggn_mc",
    "BatchDiagGGNExact": "batch_diag_ggn",
    "SqrtGGNMC": "sqrt_ggn_mc",
    "SqrtGGNExact": "sqrt_ggn",
    "KFRA": "kfra",
    "DiagHessian": "diag_hessian",
    "BatchDiagHessian": "batch_diag_hessian",
    "EKFAC mc": "ekfac",
    "EKFAC type-2": "ekfac_exact",
    "EKFAC empirical": "ekfac_empirical",
}
"""What the peers call what fxcurv has, or would have, under another name."""


def subject(quantity: str) -> str:
    """What a row of any library computes, by fxcurv's name."""
    return SAME.get(quantity, quantity.removesuffix(" dense"))


def side_by_side(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(subject, library, quantity) of rows, those that compute the same next to each other."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for library, quantity in dict.fromkeys(rows):
        found.setdefault(subject(quantity), []).append((subject(quantity), library, quantity))
    return [row for rows in found.values() for row in rows]


def fxcurv_rows() -> list[Row]:
    """Everything that has a name, under its first, the rows in front that others wait for; and factors as matrices."""
    first = {quantity: name for name, quantity in reversed(fxcurv.NAMES.items())}
    names = sorted(reversed(first.values()), key=CHEAPER.__contains__)
    rows = [
        Row("fxcurv", name, fxcurv_quantity(name), cheaper=f"fxcurv {CHEAPER[name]}" if name in CHEAPER else "")
        for name in names
    ]
    dense = [
        Row("fxcurv", f"{name} dense", fxcurv_quantity(name, dense=True), "factors as matrices", f"fxcurv {name}")
        for name in ("kfac", "kflr")
    ]
    operators = [
        Row("fxcurv", "ntk (x,x)", tangent_kernel, "full, [N, N, C, C]"),
        Row("fxcurv", "GGN product", ggn_product, "with one vector, the operator made for it"),
    ]
    return [*rows, *dense, *operators]


def backpack_row(extension: str, field: str, note: str = "and the gradient", cheaper: str = "") -> Row:
    return Row("backpack", extension, backpack_extension(extension, field), note, cheaper)


ROWS: tuple[Row, ...] = (
    FORWARD,
    GRADIENT,
    *fxcurv_rows(),
    backpack_row("KFAC", "kfac", PAIRED),
    backpack_row("KFLR", "kflr", PAIRED, "backpack KFAC"),
    backpack_row("DiagGGNMC", "diag_ggn_mc"),
    backpack_row("DiagGGNExact", "diag_ggn_exact", cheaper="backpack DiagGGNMC"),
    backpack_row("BatchGrad", "grad_batch", "per-sample gradients, and the gradient"),
    backpack_row("SumGradSquared", "sum_grad_squared"),
    backpack_row("BatchL2Grad", "batch_l2"),
    backpack_row("Variance", "variance"),
    backpack_row("BatchDiagGGNMC", "diag_ggn_mc_batch", cheaper="backpack DiagGGNMC"),
    backpack_row("BatchDiagGGNExact", "diag_ggn_exact_batch", cheaper="backpack DiagGGNExact"),
    backpack_row("SqrtGGNMC", "sqrt_ggn_mc"),
    backpack_row("SqrtGGNExact", "sqrt_ggn_exact", cheaper="backpack SqrtGGNMC"),
    backpack_row("KFRA", "kfra", PAIRED),
    backpack_row("DiagHessian", "diag_h", cheaper="backpack DiagGGNExact"),
    backpack_row("BatchDiagHessian", "diag_h_batch", cheaper="backpack DiagHessian"),
    Row("curvlinops", "KFAC mc", curvlinops_kfac("mc"), LAYERS),
    Row("curvlinops", "KFAC type-2", curvlinops_kfac("type-2"), LAYERS, "curvlinops KFAC mc"),
    Row("curvlinops", "KFAC empirical", curvlinops_kfac("empirical"), LAYERS),
    Row("curvlinops", "EKFAC mc", curvlinops_kfac("mc", corrected=True), LAYERS, "curvlinops KFAC mc"),
    Row("curvlinops", "EKFAC type-2", curvlinops_kfac("type-2", corrected=True), LAYERS, "curvlinops KFAC type-2"),
    Row("curvlinops", "EKFAC empirical", curvlinops_kfac("empirical", corrected=True), LAYERS),
    Row("curvlinops", "GGN product", curvlinops_ggn_product, "with one vector, the operator made for it"),
    Row("functorch", "ntk (x,x)", contracted_jacobians, "Jacobian contraction"),
    Row("functorch", "per-sample grad", per_sample(squared=False), "vmap of grad"),
    Row("functorch", "sum_grad_squared", per_sample(squared=True), "vmap of grad"),
)
