"""The hostile models, their oracle and their judge: tests/hostile, of which tools/stress.py tries many more."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hostile import cases, run
from hostile.cases import Case
from hostile.judge import Outcome, judged, verdict
from hostile.oracle import Answer
from hostile.processes import Server
from hostile.rows import CONSTRUCTS
from hostile.subject import Reply, replies
from torch import nn
from torch.nn.modules import module as modules

Answers = dict[tuple[int, int], Answer]

SUM = 'nn.MSELoss(reduction="sum")'
PLAIN = Case("retain_grad", loss=SUM, order=(1, 3), kflr=True)
TWICE = Case("times_detach", loss=SUM, order=(1, 3))

REFUSED = {
    "clips_in_backward": {(0, 1), (0, 3)},
    "backward_is_random": {(0, 1), (0, 3)},
    "once_twice": {(0, 1), (0, 3)},
    "running_minimum": {(0, 3)},
    "scale_grad_by_freq": {(0, 3)},
    "backward_mixes_samples": {(0, 3)},
    "caches_a_statistic": {(0, 3)},
    "dropout_trains": {(1, 1), (1, 3)},
    "reentrant": set(),
    "single": set(),
    "caches_a_graph": set(),
    "post_accumulate_steps": set(),
    "thawed": set(),
}
"""Some constructs, and the calls at which they must be refused."""


@pytest.fixture(scope="module")
def oracle() -> Iterator[Server]:
    """The oracle's process, which starts while other tests run."""
    server = Server("oracle")
    yield server
    server.close()


# Cases --------------------------------------------------------------------------------------------------------------


def test_cases_come_from_the_seed_alone() -> None:
    for seed in (0, 7, 10**9):
        assert cases.draw(seed) == cases.draw(seed)
        assert cases.source(cases.draw(seed)) == cases.source(cases.draw(seed))
    assert sorted(cases.draw(seed).construct for seed in range(len(CONSTRUCTS))) == sorted(CONSTRUCTS)


@pytest.mark.usefixtures("oracle")
def test_every_construct_is_a_model() -> None:
    """It builds and has a gradient, before and after the change of state, and the change is the same every time."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for k, (name, row) in enumerate(CONSTRUCTS.items()):
            if row.reuse:
                continue
            case = Case(name, (("smooth", 1),), (("norm", 2),), cases.SHAPES[1 + k % 2])
            for phase in (0, 1) if row.change else (0,):
                model, gradient = _with_gradient(case, phase)
                assert gradient is not None or name == "post_accumulate_steps", name
                if phase:
                    again = _with_gradient(case, phase)[0]
                    assert all(map(torch.equal, model.parameters(), again.parameters())), name
            modules._global_forward_hooks.clear()


def _with_gradient(case: Case, phase: int) -> tuple[nn.Module, torch.Tensor | None]:
    """A new model in a state, and the gradient of its first weight."""
    module = cases.load(cases.source(case))
    model, loss = module.build(), module.loss().double()
    x, y = cases.data(case, 5, loss)
    if phase:
        module.change(model, x)
    loss(model(x.clone()), y).backward()
    return model, model.m0.weight.grad


def test_a_failing_case_is_made_smaller() -> None:
    case = Case("attribute", (("linear", 1), ("smooth", 2)), (("norm", 3), ("residual", 4)))
    assert cases.smaller(case, lambda c: ("norm", 3) in c.after) == replace(case, before=(), after=(("norm", 3),))
    assert cases.smaller(case, lambda c: True) == replace(case, before=(), after=())


def test_the_script_of_a_case_is_its_source() -> None:
    """The name of a module that is executed for a model is not `__main__`."""
    case = cases.draw(5)
    module = cases.load(cases.script(case))
    assert cases.script(case).startswith(cases.source(case))
    assert module.build().site.weight.dtype == torch.float64


# The oracle ---------------------------------------------------------------------------------------------------------


def test_the_oracle_of_a_plain_model(oracle: Server) -> None:
    """Against the closed form of a network of three linear layers and one tanh, with the sum of squares."""
    module = cases.load(cases.source(PLAIN))
    model, loss = module.build(), module.loss()
    W, V = model.site.weight.detach(), model.head.weight.detach()
    for (_, batch), answer in oracle.ask(PLAIN).items():
        x, y = cases.data(PLAIN, batch, loss)
        with torch.no_grad():
            h = model.site(model.m0(x)).tanh()
            s = 2 * (model.head(h) - y)
        bent = (s @ V) * (1 - h.square())  # at the output of the site
        J = torch.einsum("co,no,oi->nci", V, 1 - h.square(), W)  # of m0.bias
        expected = {
            ("grad", "head.weight"): s.T @ h,
            ("grad", "m0.bias"): (bent @ W).sum(0),
            ("batch_grad", "site.weight"): torch.einsum("no,ni->noi", bent, model.m0(x).detach()),
            ("diag_ggn", "head.weight"): 2 * h.square().sum(0).expand(3, -1),
            ("diag_ggn", "m0.bias"): 2 * J.square().sum((0, 1)),
            ("kflr", "head.weight"): torch.kron(2 * torch.eye(3, dtype=h.dtype), h.T @ h),
        }
        for (quantity, name), value in expected.items():
            torch.testing.assert_close(answer.values[quantity][name], value)
        assert set(answer.reached) == set(answer.trainable) == {name for name, _ in model.named_parameters()}
        assert ("site.weight" in answer.single) == (batch == 1)


def test_the_oracle_of_second_derivatives(oracle: Server) -> None:
    """What is detached is constant in the second derivative too."""
    module = cases.load(cases.source(TWICE))
    model, loss = module.build(), module.loss()
    V = model.head.weight.detach()
    for (_, batch), answer in oracle.ask(TWICE).items():
        x, y = cases.data(TWICE, batch, loss)
        with torch.no_grad():
            h = model.m0(x)
            t = model.site(h).tanh()
            s = 2 * (model.head(t * h) - y)
        slope, bend = (1 - t.square()) * h, -2 * t * (1 - t.square()) * h
        expected = (2 * slope.square() * V.square().sum(0) + bend * (s @ V)).sum(0)
        torch.testing.assert_close(answer.values["diag_hessian"]["site.bias"], expected)


def test_the_oracle_refuses(oracle: Server) -> None:
    for name, refused in REFUSED.items():
        answers: Answers = oracle.ask(Case(name, loss=SUM, order=(1, 3)))
        assert {call for call, answer in answers.items() if answer.refusal} == refused, name


def test_the_oracle_removes_hooks_of_optimizers(oracle: Server) -> None:
    answers: Answers = oracle.ask(Case("post_accumulate_steps", order=(3,)))
    plain: Answers = oracle.ask(replace(PLAIN, construct="post_accumulate_logs", loss=cases.LOSSES[0], order=(3,)))
    for name, value in plain[0, 3].values["grad"].items():
        assert torch.equal(answers[0, 3].values["grad"][name], value)
        assert value.any()


def test_a_call_leaves_nothing_behind(oracle: Server) -> None:
    """A hook of all modules, which the construct registers in torch itself, does not reach the next model."""
    before = oracle.ask(PLAIN)[0, 3].values["grad"]
    oracle.ask(Case("forward_hook_of_all_modules", order=(1,)))
    after = oracle.ask(PLAIN)[0, 3].values["grad"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_error_of_a_construct_is_raised(oracle: Server) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        oracle.ask(PLAIN, "1 / 0")


# The judge ----------------------------------------------------------------------------------------------------------


def test_a_plain_model_is_right(oracle: Server) -> None:
    assert verdict(oracle.ask(PLAIN), replies(PLAIN)) == Outcome("right")


def test_a_refusal_by_compile_is_the_reply_to_every_call() -> None:
    found = replies(Case("retain_grad", loss="nn.L1Loss()", order=(1, 3)))
    assert {reply.code for reply in found.values()} == {"FXC406"}
    assert len(found) == 2


def test_the_state_of_the_caller_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that draws a random number, or logs to the model, has changed something."""
    import fxcurv

    called = fxcurv.Compiled.__call__

    def noisy(self: fxcurv.Compiled, x: torch.Tensor, y: torch.Tensor) -> fxcurv.Curvature:
        torch.rand(())
        self.model.log.append(1)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        return called(self, x, y)

    monkeypatch.setattr(fxcurv.Compiled, "__call__", noisy)
    with torch.random.fork_rng(devices=[]):
        (reply,) = replies(Case("post_accumulate_logs", order=(3,))).values()
    assert reply.changed == "torch's random numbers, .log"
    assert judged(Answer(), reply).kind == "wrong"


ONE, TWO = torch.ones(2, 2), 2 * torch.ones(2, 2)
ANSWER = Answer(values={"grad": {"w": ONE}}, trainable=("w",), reached=("w",))
FACTORS = Answer(values={"kflr": {"w": ONE}}, trainable=("w",), reached=("w",))
REPLY = Reply({"grad": {"w": ONE}}, {"grad": {"w": "exact"}})
MISSING = Reply({"grad": {}}, {"grad": {"w": "unreached"}})
REFUSAL = Reply(code="FXC208", error="node 'x': it mixes; do not [FXC208]")
KRONECKER = Reply({"kflr": {"w": TWO}}, {"kflr": {"w": "exact"}}, ("w",))


@pytest.mark.parametrize(
    ("answer", "reply", "kind"),
    [
        (ANSWER, REPLY, "right"),
        (ANSWER, replace(REPLY, values={"grad": {"w": ONE + 1e-6}}), "wrong"),
        (ANSWER, replace(REPLY, values={"grad": {"w": ONE[:1]}}), "wrong"),
        (ANSWER, replace(REPLY, values={"grad": {"w": ONE * float("nan")}}), "wrong"),
        (ANSWER, replace(REPLY, changed="w.grad"), "wrong"),
        (Answer("the samples mix"), REPLY, "wrong"),
        (Answer(values={"grad": {}}), REPLY, "wrong"),
        (ANSWER, MISSING, "dropped"),
        (ANSWER, Reply({"grad": {}}), "dropped"),
        (Answer(values={"grad": {"w": 0 * ONE}}, trainable=("w",)), MISSING, "right"),
        (FACTORS, KRONECKER, "right"),
        (replace(FACTORS, single=("w",)), KRONECKER, "wrong"),
        (FACTORS, replace(KRONECKER, kronecker=()), "wrong"),
        (ANSWER, Reply(error="ValueError: x"), "crashed"),
        (ANSWER, replace(REFUSAL, code="without code, cause or remedy"), "wrong"),
        (ANSWER, REFUSAL, "refused"),
        (Answer("the samples mix"), REFUSAL, "refused"),
    ],
)
def test_the_judge(answer: Answer, reply: Reply, kind: str) -> None:
    assert judged(answer, reply).kind == kind


def test_the_worst_call_decides() -> None:
    mixes, answers = Answer("the samples mix"), {(0, 1): ANSWER, (0, 3): Answer("the samples mix")}
    assert verdict(answers, {(0, 1): REPLY, (0, 3): REFUSAL}) == Outcome(
        "refused", ("FXC208",), True, f"N=3, at first: {REFUSAL.error}"
    )
    assert verdict(answers, {(0, 1): REFUSAL, (0, 3): REFUSAL}).due
    assert not verdict({(0, 1): ANSWER, (0, 3): ANSWER}, {(0, 1): REPLY, (0, 3): REFUSAL}).due
    assert verdict(answers, {(0, 1): MISSING, (0, 3): REFUSAL}).kind == "dropped"
    assert verdict({(1, 1): mixes}, {(2, 1): REPLY}).reason.startswith("N=1, after the change, compiled anew: values")


def test_the_table_counts() -> None:
    found = [
        (Case("reentrant"), Outcome("right")),
        (Case("reentrant"), Outcome("dropped")),
        (Case("centred"), Outcome("refused", ("FXC208",), True)),
        (Case("centred"), Outcome("refused", ("FXC106",))),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.table(found).splitlines()]
    assert ["reentrant", "checkpoint", "2", "1", "", "", "1", "", "", ""] in rows
    assert ["mixing", "2", "", "1", "1", "", "", "", "FXC106, FXC208"] in rows
