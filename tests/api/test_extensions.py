"""Extensions from outside: one package adds an op, quantities, losses, a kind of block, a pass and a code.

The package is written to a temporary folder and imported as a user's would be; every table that it changes is put back
afterwards. Values are compared with brute force in float64.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from batches import Interrupting, alike
from torch import Tensor, nn

import fxcurv
from fxcurv.blocks.base import KINDS as BLOCKS
from fxcurv.checks.codes import CODES
from fxcurv.checks.sarif import as_sarif
from fxcurv.cli.main import main
from fxcurv.core.errors import FxcurvError, SpecError
from fxcurv.ir.declare import RULES
from fxcurv.losses.base import KINDS as LOSSES
from fxcurv.quantities.registry import NAMES
from fxcurv.results.merging import values_changed, values_of
from fxcurv.testing import check_loss, check_quantity
from passes import pipeline
from passes.lowering_table import LOWERINGS

TABLES: tuple[dict[Any, Any], ...] = (BLOCKS, CODES, LOSSES, LOWERINGS, NAMES, RULES)
STAGES = ("TRACED", "CANONICAL", "EMITTED")

OP = """  # y = x + x³/3, an operator without a derivative: only the rule knows one
import torch
from torch import nn

from fxcurv.ir.declare import elementwise
from passes.lowering_table import unary

LIBRARY = torch.library.Library("curvature_extras", "DEF")
LIBRARY.define("softcube(Tensor x) -> Tensor")
LIBRARY.impl("softcube", lambda x: x + x**3 / 3, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "curvature_extras::softcube",
    lambda ctx, g: g * (1 + ctx.saved_tensors[0] ** 2),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=LIBRARY,
)

class Softcube(nn.Module):
    def forward(self, x):
        return torch.ops.curvature_extras.softcube(x)

unary("curvature_extras.softcube", lambda a: Softcube())
elementwise(Softcube, lambda op, x, y: 1 + x * x)
"""

BLOCK = """  # a multiple of the identity
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxcurv.blocks.base import Block

@dataclass(frozen=True, eq=False)
class Multiple(Block):
    fields: ClassVar = {"factor": "factor"}
    options: ClassVar = {"inputs": int}

    factor: Tensor
    inputs: int = 0

    @classmethod
    def fits(cls, shape, sizes):
        return [*sizes] == [torch.Size()]

    tensors = property(lambda self: {"factor": self.factor})
    count = property(lambda self: self.inputs)
    _like = property(lambda self: self.factor)

    def counted(self, count):
        return replace(self, inputs=count)
    def _mm(self, matrix):
        return self.factor * matrix
    def dense(self):
        return self.factor * torch.eye(self.numel, dtype=self.dtype)
    def diag(self):
        return self.factor.expand(self.shape)
    def _mapped(self, f):
        return replace(self, factor=f(self.factor))
    def eigvalsh(self):
        return self.factor.expand(self.numel)
    def eigh(self):
        return self.eigvalsh(), torch.eye(self.numel, dtype=self.dtype)
    def __mul__(self, factor):
        return replace(self, factor=self.factor * self._factor(factor))
"""

QUANTITIES = '''  # norms by sample, kept apart or refused; the trace as a number; the trace as a block
from dataclasses import dataclass
from typing import Any

from curvature_extras.block import Multiple

from fxcurv.contractions.definitions import SquaredNorms, SumOfSquares
from fxcurv.quantities.factors import Exact
from fxcurv.quantities.registry import NAMES

@dataclass(frozen=True)
class Refused:
    """What each sample adds to the trace of the GGN, `[N]`, with no word on how batches combine."""

    factor: Any = Exact()
    family = "sample_trace"

    def owner(self, usage):
        return usage.name
    def statistics(self, usage):
        return {"norms": SquaredNorms()}
    def finish(self, usage, sums, samples):
        return sums["norms"]
    def approximation(self, usage):
        return None

class Apart(Refused):
    combine = "concatenate"

class Misspelt(Refused):
    combine = "stack"

class Trace(Refused):
    family = "trace"
    combine = "add"

    def statistics(self, usage):
        return {"diagonal": SumOfSquares()}

    def finish(self, usage, sums, samples):
        return sums["diagonal"].sum()

class Isotropic(Trace):
    family = "isotropic"
    structure = "block"

    def finish(self, usage, sums, samples):
        return Multiple(usage.shape, sums["diagonal"].sum() / usage.numel, samples)

class BlocksApart(Isotropic):
    combine = "concatenate"  # of blocks, which has no meaning

class NumbersApart(Trace):
    combine = "concatenate"  # of numbers, nor has this

NAMES["extra_trace"] = Trace()
'''

LOSS = """  # counts with the rate exp f, and half the squared error, whose module is made from torch's
import torch
from torch import nn

from fxcurv.losses.base import Loss, value_and_gradient
from fxcurv.losses.terms import ScalarTerms

class Poisson(Loss):
    name = "poisson"
    module_type = nn.PoissonNLLLoss
    function = nn.functional.poisson_nll_loss

    def compute(self, output, target):
        divisor = float(output.numel()) if self.reduction == "mean" else 1.0
        noise = lambda generator: self.random_target(output, generator) - self.mean(output)
        value, gradient = value_and_gradient(self.module, output, target)
        return ScalarTerms(value, gradient, output.new_ones(()) / divisor, divisor, self.variance(output), noise), []
    def mean(self, output):
        return output.exp()
    variance = mean
    def random_target(self, output, generator):
        return torch.poisson(output.exp(), generator=generator)

class HalfSquaredError(nn.MSELoss):
    def forward(self, input, target):
        return super().forward(input, target) / 2

class Half(Poisson):
    name = "half_squared_error"
    module_type = HalfSquaredError
    function = None
    def mean(self, output):
        return output
    def variance(self, output):
        return output.new_ones(())
    def random_target(self, output, generator):
        return output + torch.randn(output.shape, generator=generator, dtype=output.dtype)
"""

PASSES = """  # a pass in every table that notes that it ran, and fails when asked to
from torch import fx

from passes import pipeline
from passes.pipeline import Pass

RAN, FAILING = [], []

def noted(name):
    def run(gm, context):
        RAN.append(name)
        if name in FAILING:
            raise RuntimeError("no such graph")
        copied = fx.GraphModule(gm, gm.graph)
        copied.noted = name
        return copied

    return Pass(name, run)

pipeline.TRACED += (noted("note_lowered"),)
pipeline.CANONICAL += (noted("note_canonical"),)
pipeline.EMITTED += (noted("note_emitted"),)
"""

CODE = '''  # a code of the package's own, and a lowering that refuses with it
from fxcurv.checks.codes import CODES, read
from fxcurv.core.errors import UnsupportedError
from passes.lowering_table import lowers

CODES.update(read("""
[EXT101]
title = "the sign is taken"
kind = "replace"
severity = "warning"
explanation = "A sign has no curvature."
remedy = "use tanh"
"""))

@lowers("sgn", "sign")
def refused(low, node, a):
    code = "EXT101" if str(node.target) == "aten.sign.default" else "EXT999"
    raise UnsupportedError("it takes the sign", remedy="use tanh", code=code)
'''

FILES = {"op": OP, "block": BLOCK, "quantities": QUANTITIES, "loss": LOSS, "notes": PASSES, "code": CODE}


@contextmanager
def installed(folder: Path) -> Iterator[Any]:
    """The package, imported; every table as it was before, afterwards."""
    package = folder / "curvature_extras"
    package.mkdir()
    imports = "".join(f"from curvature_extras import {name} as {name}\n" for name in FILES)
    for name, text in {**FILES, "__init__": imports}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    tables, stages = [dict(table) for table in TABLES], [getattr(pipeline, name) for name in STAGES]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            yield importlib.import_module("curvature_extras")
        finally:
            for table, before in zip(TABLES, tables, strict=True):
                table.clear()
                table.update(before)
            for name, before in zip(STAGES, stages, strict=True):
                setattr(pipeline, name, before)
            if module := sys.modules.get("curvature_extras.op"):
                module.LIBRARY._destroy()
            for name in [name for name in sys.modules if name.partition(".")[0] == "curvature_extras"]:
                del sys.modules[name]


@pytest.fixture
def extras(tmp_path: Path) -> Iterator[Any]:
    with installed(tmp_path) as package:
        yield package


class Act(nn.Module):
    """A function as a module."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)


TWIN = Act(lambda x: x + x**3 / 3)
"""The op of the package as a formula."""


def network(act: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2)).double().eval()


def data(classes: bool = True, N: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(2, (N,) if classes else (N, 2), generator=generator)
    return x, y if classes else y.double()


LOSS_FUNCTION = nn.CrossEntropyLoss()


def sample_traces(act: nn.Module) -> dict[str, Tensor]:
    """Σ_v ‖J_vn‖² of every sample by brute force, `[N]`."""
    model, (x, y) = network(act), data()
    J = reference.jacobians(model, x)
    pulled = reference.pulled(J, reference.exact_columns(LOSS_FUNCTION, reference.outputs(model, x), y))
    return {name: u.square().flatten(2).sum((0, 2)) for name, u in pulled.items()}


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


# The package as a whole -------------------------------------------------------------------------------------------


def test_the_package_leaves_nothing_behind(tmp_path: Path) -> None:
    before = [dict(table) for table in TABLES], [getattr(pipeline, name) for name in STAGES], list(sys.path)
    with installed(tmp_path) as package:
        assert package.op.Softcube in RULES
        assert "Multiple" in BLOCKS
        assert "poisson" in LOSSES
    assert before == ([dict(table) for table in TABLES], [getattr(pipeline, name) for name in STAGES], list(sys.path))
    assert not any(name.startswith("curvature_extras") for name in sys.modules)


def test_all_extensions_together(extras: Any, tmp_path: Path) -> None:
    """The op, the loss, the quantities and the block of the package in one model, through every verb."""
    model, (x, y) = network(extras.op.Softcube()), data(classes=False)
    asked = [extras.quantities.Apart(), "extra_trace", extras.quantities.Isotropic()]
    compiled = fxcurv.compile(model, "poisson", asked)
    whole = compiled(x, y)
    halves = compiled(x[:2], y[:2]), compiled(x[2:], y[2:])
    path = tmp_path / "result.safetensors"
    whole.save(path)
    alike(fxcurv.load(path), whole)
    merged = fxcurv.merge(*halves)
    accumulated = compiled.accumulate([(x[:2], y[:2]), (x[2:], y[2:])], progress=False)
    for found in (merged, accumulated):
        for name in ("sample_trace", "extra_trace"):
            for parameter, value in whole[name].items():
                close(found[name][parameter], value)
        for parameter, block in whole["isotropic"].items():
            assert type(found["isotropic"][parameter]) is extras.block.Multiple
            close(found["isotropic"][parameter].factor, block.factor)
            assert found["isotropic"][parameter].inputs == 6
    text = str(compiled.explain(x))
    assert "Softcube" in text
    assert "isotropic" in text
    assert any(isinstance(module, extras.op.Softcube) for module in compiled.stages["canonical"].modules())
    shape = fxcurv.check(model, x, asked, loss="poisson")
    numeric = fxcurv.check(network(TWIN), x, asked, loss="poisson", level="numeric")  # autograd has no Softcube
    assert shape.ok, str(shape)
    assert numeric.ok, str(numeric)


# An op ------------------------------------------------------------------------------------------------------------


def test_an_op_has_the_derivative_of_its_rule(extras: Any) -> None:
    model, twin, (x, y) = network(extras.op.Softcube()), network(TWIN), data()
    result = fxcurv.compile(model, LOSS_FUNCTION, ["grad", "diag_ggn"])(x, y)
    for quantity, oracle in (("grad", reference.grad), ("diag_ggn", reference.diag_ggn)):
        for name, value in oracle(twin, LOSS_FUNCTION, x, y).items():
            close(result[quantity][name], value)
            assert result[quantity].status[name] == "exact"


# Quantities -------------------------------------------------------------------------------------------------------


def test_samples_are_laid_side_by_side(extras: Any) -> None:
    compiled = fxcurv.compile(network(TWIN), LOSS_FUNCTION, extras.quantities.Apart())
    (x, y), expected = data(), sample_traces(TWIN)
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]  # of one size, so that a sum would pass unseen
    merged = fxcurv.merge(*(compiled(*half) for half in halves))
    for found in (compiled(x, y), merged, compiled.accumulate(halves, progress=False)):
        for name, value in expected.items():
            close(found["sample_trace"][name], value)


@pytest.mark.parametrize("kind", ["Refused", "Misspelt", "BlocksApart", "NumbersApart"])
def test_what_cannot_combine_is_never_summed(extras: Any, kind: str) -> None:
    (x, y), quantity = data(), getattr(extras.quantities, kind)()
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]

    compiled = fxcurv.compile(network(TWIN), LOSS_FUNCTION, quantity)
    says = {"Refused": "is not determined by", "Misspelt": "combine='stack'"}.get(kind, "no axis of samples")
    with pytest.raises(FxcurvError, match=says):
        fxcurv.merge(*(compiled(*half) for half in halves))
    with pytest.raises(FxcurvError, match=says):
        compiled.accumulate(halves, progress=False)


def test_a_number_survives_files_and_checkpoints(extras: Any, tmp_path: Path) -> None:
    compiled = fxcurv.compile(network(TWIN), LOSS_FUNCTION, ["extra_trace", extras.quantities.Isotropic()])
    (x, y), path = data(), tmp_path / "checkpoint"
    batches = [(x[k : k + 2], y[k : k + 2]) for k in (0, 2, 4)]
    whole = compiled.accumulate(batches, progress=False)
    with pytest.raises(KeyboardInterrupt):
        compiled.accumulate(Interrupting(batches, 2), checkpoint=path, every=1, progress=False)
    alike(compiled.accumulate(batches, checkpoint=path, every=1, progress=False), whole)
    for name, value in sample_traces(TWIN).items():
        assert whole["extra_trace"][name].shape == ()
        close(whole["extra_trace"][name], value.sum())
        close(whole["isotropic"][name].trace(), value.sum())


@pytest.mark.parametrize("kind", ["Refused", "Apart", "Trace", "Isotropic"])
def test_check_quantity(extras: Any, kind: str) -> None:
    assert check_quantity(getattr(extras.quantities, kind)(), network(TWIN), LOSS_FUNCTION, *data()) is None


def test_a_count_that_a_file_cannot_hold_is_named_as_the_block_names_it(extras: Any, tmp_path: Path) -> None:
    result, path = fxcurv.compile(network(TWIN), LOSS_FUNCTION, extras.quantities.Isotropic())(*data()), tmp_path / "a"
    with pytest.raises(
        FxcurvError, match=r"isotropic/0.weight cannot be saved: it has a number of inputs, inputs, that"
    ):
        values_changed(result, [value.counted(-1) for value in values_of(result)]).save(path)  # pyright: ignore
    assert not path.exists()


# Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reduction"), [("poisson", "mean"), ("half_squared_error", "sum")])
def test_a_loss(extras: Any, name: str, reduction: str) -> None:
    module = LOSSES[name].module_type(reduction=reduction)  # pyright: ignore[reportCallIssue]
    model, (x, y) = network(TWIN), data(classes=False)
    result = fxcurv.compile(model, module, ["grad", "diag_ggn"])(x, y)
    close(result.loss, module(model(x), y).detach())
    for quantity, oracle in (("grad", reference.grad), ("diag_ggn", reference.diag_ggn)):
        for parameter, value in oracle(model, module, x, y).items():
            close(result[quantity][parameter], value)
    check_loss(module, model(x), y)
    check_loss(name, model(x), y)
    assert type(fxcurv.compile(model, nn.MSELoss()).loss) is LOSSES["mse"]
    with pytest.raises(FxcurvError, match=r"nn\.PoissonNLLLoss or HalfSquaredError"):
        fxcurv.compile(model, nn.L1Loss())


# Passes -----------------------------------------------------------------------------------------------------------


def test_passes_run_and_are_in_the_stages(extras: Any) -> None:
    compiled = fxcurv.compile(network(TWIN), LOSS_FUNCTION, "diag_ggn")
    (x, y) = data()
    compiled(x, y)
    assert extras.notes.RAN == ["note_lowered", "note_canonical", "note_emitted", "note_emitted"]
    for stage in ("lowered", "canonical", "forward", "backward[exact]"):
        name = f"note_{stage}" if stage in ("lowered", "canonical") else "note_emitted"
        assert compiled.stages[f"{stage}:{name}"] is compiled.stages[stage]
        assert compiled.stages[stage].noted == name


@pytest.mark.parametrize("name", ["note_lowered", "note_canonical", "note_emitted"])
def test_a_pass_that_fails_is_named(extras: Any, name: str) -> None:
    extras.notes.FAILING.append(name)
    with pytest.raises(RuntimeError, match="no such graph") as raised:
        fxcurv.compile(network(TWIN), LOSS_FUNCTION, "diag_ggn")(*data())
    assert f"in the pass {name!r} of fxcurv" in "".join(raised.value.__notes__)


@pytest.mark.parametrize(("table", "stage"), [*zip(STAGES, ("lowered", "canonical", "forward"), strict=True)])
def test_a_graph_that_breaks_the_grammar_names_the_pass(
    extras: Any, table: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gm: Any, context: Any) -> Any:
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            gm.graph.call_function(torch.neg, (gm.graph.find_nodes(op="placeholder")[0],))
        return gm

    last = pipeline.Pass("broken", broken)
    monkeypatch.setattr(pipeline, table, (*getattr(pipeline, table), last))
    with pytest.raises(SpecError, match=f"after the pass 'broken' the graph is not legal in a {stage} graph"):
        fxcurv.compile(network(TWIN), LOSS_FUNCTION, "diag_ggn")(*data())


# Codes ------------------------------------------------------------------------------------------------------------


def test_a_code_is_explained_and_reported(extras: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "ext101"]) == 0
    assert "EXT101  the sign is taken  (replace, warning)" in capsys.readouterr().out
    report = fxcurv.check(network(Act(torch.sign)), data()[0], "diag_ggn")
    assert {row.code for row in report.findings} == {"EXT101"}
    assert "EXT101" in str(report)
    assert "EXT101" in as_sarif([report])


def test_a_code_that_no_table_has_is_an_error_of_the_check(extras: Any) -> None:
    report = fxcurv.check(network(Act(torch.sgn)), data()[0], "diag_ggn")
    assert {row.code for row in report.findings} == {"FXC904"}
    assert "it takes the sign" in str(report)
    assert not report.ok
