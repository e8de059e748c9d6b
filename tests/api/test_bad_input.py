"""Wrong use gets an error that says node, cause and remedy, and leaves the model and the caller as they were.

What each case says is in tests/messages.txt, word for word; `python tests/api/test_bad_input.py` writes it anew.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from bad_inputs import ANEW, CASES, MESSAGES, OPTIONS, Case, X, Y, said, small
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv

# That nothing else happens -----------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[object, ...]:
    """Everything of a model that a call must not change."""
    tensors = {
        name: (id(t), t._version, t.detach().clone(), t.requires_grad, id(t.grad), t.grad is None or t.grad._version)
        for name, t in model.state_dict(keep_vars=True).items()
    }
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return tensors, modes


def same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    (tensors, modes), (tensors_after, modes_after) = a, b
    assert isinstance(tensors, dict)
    assert isinstance(tensors_after, dict)
    equal = all(
        t[:2] == u[:2] and torch.allclose(t[2], u[2], 0, 0, equal_nan=True) and t[3:] == u[3:]
        for t, u in zip(tensors.values(), tensors_after.values(), strict=True)
    )
    return equal and list(tensors) == list(tensors_after) and modes == modes_after


@pytest.mark.filterwarnings("ignore:.*target size:UserWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_with_a_reason(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of the model, the input and the random states changes, nothing is printed, and it is said again."""
    model = case.model()
    watched = isinstance(model, nn.Module) and case.name != "model_lazy"
    x, state, python = copy.deepcopy(case.x), torch.get_rng_state(), random.getstate()
    if watched:
        model.register_forward_hook(lambda *_: None)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    before, values = snapshot(model) if watched else (), copy.deepcopy(x)
    messages: list[str] = []
    compiled: fxcurv.Compiled | None = None
    for _ in range(2):
        with pytest.raises(fxcurv.FxcurvError) as caught:  # noqa: PT012
            compiled = compiled or fxcurv.compile(model, case.loss, case.quantities)  # pyright: ignore[reportArgumentType]
            compiled(x, case.y)  # pyright: ignore[reportArgumentType]
        assert caught.value.remedy, "every error says what to do"
        messages.append(said(caught.value))
    assert messages == [MESSAGES[case.name]] * 2, ANEW
    assert not watched or same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == python
    assert capfd.readouterr() == ("", "")
    if isinstance(x, Tensor) and isinstance(values, Tensor) and x.device.type == "cpu" and x.layout == torch.strided:
        assert torch.equal(x.nan_to_num(), values.nan_to_num())
    if compiled is not None and case.model is small and case.loss == "cross_entropy" and case.quantities == "kfac":
        assert len(compiled(X, Y)["kfac"]) == 6, "it can be used again"


def test_the_catalogue_has_every_case_and_no_other() -> None:
    assert list(MESSAGES) == [*(case.name for case in CASES), *OPTIONS]
    assert len(MESSAGES) == len(CASES) + len(OPTIONS) >= 80


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(fxcurv.FxcurvError) as caught:
        OPTIONS[name]()
    assert said(caught.value) == MESSAGES[name], ANEW


def test_a_compiled_object_can_be_used_after_an_error() -> None:
    compiled = fxcurv.compile(small())
    for x, y in ((X * float("nan"), Y), (X[:, :2], Y), (X, Y + 5)):
        with pytest.raises(fxcurv.FxcurvError):
            compiled(x, y)
    assert len(compiled(X, Y)["kfac"]) == 6


def test_a_call_changes_nothing_of_the_model() -> None:
    model = small()
    model[0].register_forward_hook(lambda *_: None)
    F.cross_entropy(model(X), Y).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = snapshot(model)
    fxcurv.compile(model, quantities=list(fxcurv.NAMES))(X, Y)
    assert same(before, snapshot(model))
    assert all(
        p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)
    )


def test_results_are_looked_up_by_names_that_exist() -> None:
    model = small()
    model[0].bias.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
    result = fxcurv.compile(model)(X, Y)
    with pytest.raises(fxcurv.QuantityError, match="'diag_ggn' was not computed; there are kfac"):
        result["diag_ggn"]
    with pytest.raises(fxcurv.QuantityError, match="the model has no parameter 'nope'"):
        result["kfac"]["nope"]
    with pytest.raises(fxcurv.QuantityError, match=r"kfac of '0.bias' has no value: frozen; set requires_grad_"):
        result["kfac"]["0.bias"]


def test_stages_before_compiling() -> None:
    with pytest.raises(fxcurv.FxcurvError, match="nothing is compiled yet; call it on a batch first"):
        _ = fxcurv.compile(small()).stages


def test_a_mode_changed_after_compiling_is_noticed() -> None:
    model = small()
    compiled = fxcurv.compile(model)
    compiled(X, Y)
    model.train()
    with pytest.raises(fxcurv.CaptureError, match=r"call model\.eval"):
        compiled(X, Y)
    model.eval()
    compiled(X, Y)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_contexts_make_no_difference(context: Callable[[], object]) -> None:
    model = small()
    expected = fxcurv.compile(model, quantities=["kflr", "diag_ggn", "grad"])(X, Y)
    with context():  # pyright: ignore[reportGeneralTypeIssues]
        result = fxcurv.compile(model, quantities=["kflr", "diag_ggn", "grad"])(X, Y)
        inside = fxcurv.compile(model, quantities=["diag_ggn"])(X * 1, Y)
    for name in expected["diag_ggn"]:
        torch.testing.assert_close(result["diag_ggn"][name], expected["diag_ggn"][name], rtol=0, atol=0)
        torch.testing.assert_close(inside["diag_ggn"][name], expected["diag_ggn"][name], rtol=0, atol=0)
        torch.testing.assert_close(result["kflr"][name].dense(), expected["kflr"][name].dense(), rtol=0, atol=0)
