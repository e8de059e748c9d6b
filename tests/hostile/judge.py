"""The judge: fxcurv's replies compared with the oracle's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from hostile.cases import Case
from hostile.oracle import Answer

if TYPE_CHECKING:
    from hostile.subject import Reply

__all__ = ["BAD", "Outcome", "judged", "outcome", "verdict"]

BAD = ("crashed", "wrong", "dropped")
"""Outcomes that fxcurv promises not to have, the worst first."""

TOLERANCE = 1e-7
"""Relative to the largest entry; everything is float64, and the gradients of the trials pass through a factor 1000."""


@dataclass(frozen=True)
class Outcome:
    """`right`, `refused`, or one of `BAD`; `due` says that nothing was refused but models that had to be.

    Such a model has no values at some of its calls: samples do not mix in a batch of one, but a compiler need not see
    that. `codes` are those of the refusals, and `reason` describes the first call of the worst outcome.
    """

    kind: str
    codes: tuple[str, ...] = ()
    due: bool = False
    reason: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, *self.codes, "(due)" if self.due else "", self.reason)))


def verdict(answers: Mapping[tuple[int, int], Answer], replies: Mapping[tuple[int, int], Reply]) -> Outcome:
    """The outcome of a case: the worst of its calls."""
    found: list[Outcome] = []
    refused = {phase for (phase, _), answer in answers.items() if answer.refusal}
    for (phase, batch), reply in replies.items():
        one = judged(answers[min(phase, 1), batch], reply)
        one = replace(one, due=one.kind == "refused" and min(phase, 1) in refused)
        state = ("at first", "after the change", "after the change, compiled anew")[phase]
        found.append(Outcome(one.kind, one.codes, one.due, one.reason and f"N={batch}, {state}: {one.reason}"))
    for kind in (*BAD, "refused"):
        calls = [one for one in found if one.kind == kind]
        if calls:
            codes = tuple(sorted({code for one in found for code in one.codes}))
            return Outcome(kind, codes, kind == "refused" and all(one.due for one in calls), calls[0].reason)
    return Outcome("right")


def judged(answer: Answer, reply: Reply) -> Outcome:
    """The outcome of one call."""
    if reply.error and not reply.code:
        return Outcome("crashed", reason=reply.error.strip())
    if reply.changed:
        return Outcome("wrong", reason=f"the call changed {reply.changed}")
    if reply.code:
        if not reply.code.startswith("FXC"):
            return Outcome("wrong", reason=f"a refusal {reply.code}: {reply.error}")
        return Outcome("refused", (reply.code,), reason=reply.error)
    if answer.refusal:
        return Outcome("wrong", reason=f"values, though {answer.refusal}")
    return _compared(answer, reply)


def _compared(answer: Answer, reply: Reply) -> Outcome:
    """The outcome of a call that has values in both."""
    for quantity, expected in answer.values.items():
        found = reply.values.get(quantity, {})
        for name in (*expected, *found):
            if name not in answer.trainable:
                return Outcome("wrong", reason=f"{quantity} of {name}, which requires no gradient")
            if name in found:
                factors = quantity == "kflr" and name in reply.kronecker
                if (name in answer.single or not factors) and (text := _difference(found[name], expected[name])):
                    return Outcome("wrong", reason=f"{quantity} of {name} {text}")
            elif name in answer.reached or expected[name].any():
                status = reply.status.get(quantity, {}).get(name, "missing")
                return Outcome("dropped", reason=f"{quantity} of {name} is {status}")
            elif reply.status.get(quantity, {}).get(name) != "unreached":
                return Outcome("dropped", reason=f"{quantity} of {name} has no value, and is not unreached")
    return Outcome("right")


def _difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"has the shape {list(found.shape)}, not {list(expected.shape)}"
    off, scale = float((found - expected).abs().max()), max(float(expected.abs().max()), 1e-3)
    return "" if off <= TOLERANCE * scale else f"is off by {off:.3g}, entries up to {scale:.3g}"


def outcome(case: Case, text: str | None = None) -> Outcome:
    """The outcome of one case, in new processes."""
    from hostile.processes import Pair

    with Pair() as pair:
        return pair.outcome(case, text)
