"""Errors: each says the node, the cause and the remedy."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "FxcurvError",
    "InputError",
    "LossError",
    "QuantityError",
    "SpecError",
    "UnsupportedError",
]


class FxcurvError(Exception):
    """`node: cause; remedy`: where it happened, what is wrong, and what to do about it."""

    def __init__(self, cause: str, *, node: str | None = None, remedy: str | None = None) -> None:
        self.cause, self.node, self.remedy = cause, node, remedy
        super().__init__(cause, node, remedy)

    def __str__(self) -> str:
        where = f"node {self.node}: " if self.node else ""
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{where}{self.cause}{advice}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.cause, self.node, self.remedy))


def _rebuild(kind: type[FxcurvError], cause: str, node: str | None, remedy: str | None) -> FxcurvError:
    return kind(cause, node=node, remedy=remedy)


class CaptureError(FxcurvError):
    """The model cannot be captured as one graph that is valid for every batch size."""


class UnsupportedError(FxcurvError):
    """The graph holds something for which no exact or named treatment exists."""


class QuantityError(FxcurvError):
    """A quantity, a parameter or an option was asked for that does not exist."""


class InputError(FxcurvError):
    """Inputs, targets or the model's mode are not what the call needs."""


class LossError(FxcurvError):
    """The loss, or what it is applied to, is not supported."""


class SpecError(FxcurvError):
    """A graph breaks the grammar of its stage: a defect of fxcurv, please report it."""
