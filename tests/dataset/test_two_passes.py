"""EKFAC over a data set equals one big batch and brute force; what makes two passes see other data is refused."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import samples
import torch
from batches import BATCHES, Interrupting, alike, cut, emptied, seeded
from by_hand import Approx, check
from comparison import assert_close
from curvatures import LOSSES, assert_equal, net, reals, same, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxcurv
from fxcurv.dataset.accumulation import Accumulator

EXACT = fxcurv.Exact()
FACTORS = {EXACT: reference.exact_columns, fxcurv.Empirical(): reference.empirical_columns}


def small(**options: Any) -> nn.Module:
    """Few inputs and outputs: with these batches every factor has full rank, and a basis that is unique."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 4, 2, **options), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        return nn.Sequential(*layers).double().eval()


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


# One big batch, and brute force -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("approx", "joint"), [("expand", False), ("reduce", True)])
@pytest.mark.parametrize("name", ["weighted", "ignored", "summed", "mse"])
def test_brute_force(name: str, approx: Approx, joint: bool) -> None:
    """Outputs of two and of three dimensions, class weights, ignored targets, both reductions, unequal batches."""
    dense, loss, y = LOSSES[name]
    model, x = tokens(dense), reals(7, 3, 5) - 0.5
    quantities = [fxcurv.EKFAC(factor, approx, joint) for factor in FACTORS]
    result = fxcurv.compile(model, loss, quantities).accumulate(cut(x, y))
    output = reference.outputs(model, x)
    for blocks, columns in zip(result.values(), FACTORS.values(), strict=True):
        check(model, x, blocks, columns(loss, output, y), approx=approx, joint=joint)


@pytest.mark.parametrize("row", ["conv2d.groups", "param.applied_twice_tokens", "param.tied_weight"])
def test_brute_force_of_groups_and_shared_weights(row: str) -> None:
    sample = samples.find(row)
    model, loss, x, y = sample.build(), sample.loss(), samples.inputs(sample, 5), samples.targets(sample, 5)
    for backend in ("compiled", "autograd"):
        compiled = fxcurv.compile(model, loss, ["ekfac_exact", "kflr"])
        if backend == "autograd":
            compiled = fxcurv.compile(Looped(model), loss, "ekfac_exact", on_unsupported="fallback")
        result = compiled.accumulate(cut(x, y, (2, 3)))["ekfac_exact"]
        blocks = Renamed(result) if backend == "autograd" else result
        columns = reference.exact_columns(loss, reference.outputs(model, x), y)
        check(model, x, blocks, columns, approx="expand", joint=False)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_data_set_equals_one_batch(groups: int, reduction: str) -> None:
    (x, y), loss = images(40), nn.CrossEntropyLoss(reduction=reduction)
    quantities = [fxcurv.EKFAC(f, a, j) for f in FACTORS for a in ("expand", "reduce") for j in (False, True)]
    compiled = fxcurv.compile(small(groups=groups), loss, [*quantities, "kflr", "diag_ggn", "grad"])
    found, whole = compiled.accumulate(cut(x, y, (10, 1, 29))), emptied(compiled(x, y))
    assert (found.samples, list(found), found.divisor) == (40, list(whole), whole.divisor)
    assert_close(found.loss, whole.loss, "loss")
    for entry in whole.entries:
        its = found[entry.quantity].entries[entry.parameter]
        assert (its.status, its.definition, its.form()) == (entry.status, entry.definition, entry.form())
        ours, theirs = its.value, entry.value
        if isinstance(theirs, fxcurv.Block):
            assert isinstance(ours, fxcurv.Block)
            assert (ours.parameters, ours.status, ours.reduction) == (theirs.parameters, theirs.status, reduction)
            ours, theirs = ours.dense(), theirs.dense()
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        assert_close(ours, theirs, f"{entry.quantity} {entry.parameter}")


def test_patterns_ask_for_some_parameters() -> None:
    compiled = fxcurv.compile(small(), quantities={"*": "grad", "3.*": ["ekfac_exact", "grad"]})
    x, y = images(40)
    assert_equal(without_bases(compiled.accumulate(cut(x, y, (30, 10)))), without_bases(emptied(compiled(x, y))))
    biases = fxcurv.compile(small(), quantities={"*": None, "*.bias": "ekfac_exact"})
    assert_equal(biases.accumulate(cut(x, y, (30, 10))), emptied(biases(x, y)))


def without_bases(result: fxcurv.Curvature) -> fxcurv.Curvature:
    """With matrices in the places of blocks, whose eigenvectors have no sign."""
    return result._mapped(lambda e: e if isinstance(e.value, Tensor | None) else dense(e))


def dense(entry: Any) -> Any:
    return type(entry)(**{**vars(entry), "value": entry.value.dense()})


class Looped(nn.Module):
    """A model that no graph holds: it looks at values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if float(x.detach().sum()) < math.inf else x


class Renamed(dict[str, Any]):
    """The blocks of a wrapped model by the names of the model itself."""

    def __init__(self, blocks: Any) -> None:
        plain = {name.removeprefix("model."): block for name, block in blocks.items()}
        super().__init__({name: Labelled(block) for name, block in plain.items()})


def Labelled(block: Any) -> Any:
    return type(block)(**{**fields(block), "parameters": tuple(p.removeprefix("model.") for p in block.parameters)})


def fields(block: Any) -> dict[str, Any]:
    """What makes the block."""
    return {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}


# Sampled columns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [False, True])
def test_both_passes_draw_the_same_columns(fallback: bool) -> None:
    """So that each trace is that of the diagonal of the same columns, whatever else is drawn between."""
    quantities = [fxcurv.DiagGGN(fxcurv.Sampled(3)), fxcurv.EKFAC(fxcurv.Sampled(2)), fxcurv.DiagGGN(fxcurv.Sampled(2))]
    (x, y), model = images(6), Looped(small()) if fallback else small()
    compiled = fxcurv.compile(model, quantities=quantities, on_unsupported="fallback")
    batches = cut(x, y, (2, 3, 1))
    generator = seeded()
    result = compiled.accumulate(batches, generator=generator)
    for name, block in result["ekfac"].items():
        assert_close(block.trace(), result["diag_ggn_1"][name].sum(), name)
    alike(result, compiled.accumulate(batches, generator=seeded()))
    one, whole = compiled.accumulate([(x, y)], generator=seeded()), compiled(x, y, seeded())
    for name, block in whole["ekfac"].items():
        assert_close(one["ekfac"][name].trace(), block.trace(), name)
        same(one["diag_ggn"][name], whole["diag_ggn"][name])
    plain = fxcurv.compile(model, quantities=[quantities[0], quantities[2]], on_unsupported="fallback")
    after = seeded()
    plain.accumulate(batches, generator=after)
    assert torch.equal(generator.get_state(), after.get_state()), "the second pass draws from a twin"


# What both passes read --------------------------------------------------------------------------------------------


@cache
def exact() -> fxcurv.Compiled:
    return fxcurv.compile(small(), quantities=["ekfac_exact", "grad"])


def test_data_that_are_read_once_are_refused_untouched() -> None:
    stream = iter(cut(*images(7)))
    with pytest.raises(fxcurv.InputError, match="EKFAC takes two passes") as caught:
        exact().accumulate(stream)
    assert caught.value.code == "FXC110"
    assert len(list(stream)) == 3, "nothing was read"

    class Once:
        """It cannot be told from a loader before the second pass."""

        def __init__(self) -> None:
            self.batches = iter(cut(*images(7)))

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    with pytest.raises(fxcurv.InputError, match="saw 7 samples, the second 0") as caught:
        exact().accumulate(Once())
    assert caught.value.code == "FXC431"


def test_a_loader_may_shuffle() -> None:
    x, y = images(40)
    whole = exact()(x, y)["ekfac_exact"]
    for generator in (None, seeded()):
        loader = DataLoader(TensorDataset(x, y), batch_size=15, shuffle=True, generator=generator)
        with torch.random.fork_rng(devices=[]):
            found = exact().accumulate(loader, max_batches=3, until_rel_error=1e-9)["ekfac_exact"]
        for name in whole:
            assert_close(found[name].dense(), whole[name].dense(), name)


class Stream(IterableDataset[Any]):
    """Without a length, and read anew each time."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(zip(*images(40), strict=True)))


def test_a_length_may_promise_too_much() -> None:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 9

    x, y = images(40)
    found, whole = exact().accumulate(Short(cut(x, y, (30, 10))))["ekfac_exact"], exact()(x, y)["ekfac_exact"]
    for name in whole:
        assert_close(found[name].dense(), whole[name].dense(), name)


@pytest.mark.parametrize("stop", [{}, {"max_batches": 2}])
def test_a_stream_that_starts_anew(stop: dict[str, Any], tmp_path: Path) -> None:
    x, y = (t[:30] for t in images(40)) if stop else images(40)
    whole = exact()(x, y)["ekfac_exact"]
    with torch.random.fork_rng(devices=[]):
        found = exact().accumulate(DataLoader(Stream(), batch_size=15), checkpoint=tmp_path / "c.safetensors", **stop)
    for name in whole:
        assert_close(found["ekfac_exact"][name].dense(), whole[name].dense(), name)


@pytest.mark.parametrize("stop", [{"max_batches": 2}, {"until_rel_error": 1e9, "min_batches": 2}])
def test_some_batches_must_be_the_same_ones(stop: dict[str, Any]) -> None:
    """What shuffles by torch's global generator gives them again; the generator is then where one pass leaves it."""
    loader = DataLoader(TensorDataset(*images(40)), batch_size=10, shuffle=True)
    with torch.random.fork_rng(devices=[]):
        found = exact().accumulate(loader, **stop)
        after = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        x, y = (torch.cat(parts) for parts in zip(*list(loader)[:2], strict=True))
        assert torch.equal(torch.get_rng_state(), after)
    whole = exact()(x, y)["ekfac_exact"]
    for name in whole:
        assert_close(found["ekfac_exact"][name].dense(), whole[name].dense(), name)
    with pytest.raises(fxcurv.InputError, match="batch 1 is another one") as caught:
        exact().accumulate(DataLoader(loader.dataset, batch_size=10, shuffle=True, generator=seeded()), **stop)
    assert caught.value.code == "FXC431"


class Noisy:
    """A loader whose images are augmented at random, by a generator that is not torch's."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        for x, y in cut(*images(7)):
            yield x + 1e-3 * self.random.random(), y


def test_data_that_change_are_noticed() -> None:
    with pytest.raises(fxcurv.InputError, match=r"the loss was .* in the first pass") as caught:
        exact().accumulate(Noisy())
    assert caught.value.code == "FXC431"
    assert exact().accumulate(Noisy(), check_deterministic=False).samples == 7


def test_batches_do_not_add_one_by_one() -> None:
    with pytest.raises(fxcurv.QuantityError, match="ekfac_exact takes each batch twice") as caught:
        exact().accumulator(decay=0.9)
    assert caught.value.code == "FXC425"


def test_float32_is_added_in_float64() -> None:
    model, (x, y) = small().float(), images(40)
    compiled = fxcurv.compile(model, quantities="ekfac_exact")
    found = compiled.accumulate(cut(x.float(), y, (10, 30)), dtype=torch.float64)["ekfac_exact"]
    expected = fxcurv.compile(model.double(), quantities="ekfac_exact")(x.float().double(), y)["ekfac_exact"]
    for name, block in found.items():
        assert block.dtype == torch.float64
        torch.testing.assert_close(block.dense(), expected[name].dense(), rtol=1e-4, atol=1e-6)


# Checkpoints ------------------------------------------------------------------------------------------------------


class Second:
    """A loader that is interrupted in its second pass."""

    def __init__(self, at: int) -> None:
        self.at, self.passes = at, 0

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from Interrupting(BATCHES, self.at) if self.passes == 2 else BATCHES


@cache
def sampled() -> fxcurv.Compiled:
    return fxcurv.compile(net(), quantities=["kflr", "diag_ggn_mc", "ekfac", "ekfac_exact"])


@pytest.mark.parametrize("loader", [Interrupting(BATCHES, 3), Second(0), Second(3)], ids=["first", "between", "second"])
def test_an_interrupted_pass_continues_to_the_same_bits(tmp_path: Path, loader: Any) -> None:
    path, options = tmp_path / "c.safetensors", {"checkpoint": tmp_path / "c.safetensors", "every": 2}
    whole = sampled().accumulate(BATCHES, generator=seeded())
    with pytest.raises(KeyboardInterrupt):
        sampled().accumulate(loader, generator=seeded(), **options)
    for _ in range(2):  # the second finds it complete
        alike(sampled().accumulate(BATCHES, generator=seeded(), **options), whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.second"]
    assert fxcurv.load(path).samples == 12
    with pytest.raises(fxcurv.FxcurvError, match="another accumulation: generator"):
        sampled().accumulate(BATCHES, generator=seeded(1), **options)


def test_without_a_generator_the_second_pass_draws_what_the_first_drew(tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "c.safetensors", "every": 1}
    with pytest.raises(KeyboardInterrupt):
        sampled().accumulate(Interrupting(BATCHES, 3), **options)
    result = sampled().accumulate(BATCHES, **options)
    for name, block in result["ekfac"].items():
        assert_close(block.trace(), result["diag_ggn_mc"][name].sum(), name)
    alike(result, sampled().accumulate(BATCHES, **options))


def test_a_second_checkpoint_of_other_bases_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    exact().accumulate([images(20)], checkpoint=path, generator=seeded())
    path.unlink()
    with pytest.raises(fxcurv.FxcurvError, match=r"c.safetensors.second is the checkpoint of another .*: eigenvectors"):
        exact().accumulate([images(20, seed=1)], checkpoint=path, generator=seeded())


# An operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_of_a_data_set_are_their_matrices(groups: int, joint: bool, tmp_path: Path) -> None:
    """Trace, determinant, norms, products, inverses; the trace is the exact GGN's; read back to the last bit."""
    (x, y), model = images(40), small(groups=groups)
    compiled = fxcurv.compile(model, quantities=[fxcurv.EKFAC(EXACT, joint=joint), "diag_ggn"])
    result = compiled.accumulate(cut(x, y, (10, 30)))
    result.save(tmp_path / "c.safetensors")
    loaded = fxcurv.load(tmp_path / "c.safetensors", model)
    exact = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    for name, block in result["ekfac"].items():
        matrix, v = block.dense(), samples.normal(block.shape, torch.Generator().manual_seed(0))
        damped = matrix + 0.1 * torch.eye(len(matrix), dtype=matrix.dtype)
        V = samples.normal((block.numel, 3), torch.Generator().manual_seed(1))
        trace = sum(exact[p].sum() for p in block.parameters)
        assert abs(block.trace() - trace) <= 1e-10 * trace
        for ours, theirs in (
            (block.trace(), matrix.trace()),
            (block.frobenius_norm(), torch.linalg.matrix_norm(matrix)),
            (block.logdet(0.1), torch.logdet(damped)),
            (block.det(0.1), torch.det(damped)),
            (block.diag().flatten(), matrix.diagonal()),
            (block.eigvalsh(), torch.linalg.eigvalsh(matrix).clamp(min=0)),
            (block.mv(v).flatten(), matrix @ v.flatten()),
            (block @ V, matrix @ V),
            (block.solve(v, 0.1).flatten(), torch.linalg.solve(damped, v.flatten())),
            (block.inverse(0.1).dense(), torch.linalg.inv(damped)),
            (block.sqrt().dense() @ block.sqrt().dense(), matrix),
        ):
            assert_close(ours, theirs, name)
        same(loaded["ekfac"][name], block)
    whole = torch.block_diag(*{id(b): b.dense() for b in result["ekfac"].values()}.values())
    operator = result.operator("ekfac")
    for ours, theirs in (
        (operator.trace(), whole.trace()),
        (operator.logdet(0.1), torch.logdet(whole + 0.1 * torch.eye(len(whole), dtype=whole.dtype))),
        (operator.frobenius_norm(), torch.linalg.matrix_norm(whole)),
    ):
        assert_close(ours, theirs, "the operator on all parameters")
    assert isinstance(fxcurv.compile(model).accumulator(), Accumulator)
