"""Models that nobody wrote, against the oracle: tests/generated.py, of which tools/stress.py tries many more."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import generated
import pytest
from generated import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 24, 8))
def test_generated_models(start: int) -> None:
    for seed in range(start, start + 8):
        case = generated.draw(seed)
        try:
            kind = generated.check(case)
        except Exception as error:
            raise AssertionError(f"{error}\n{generated.script(case)}") from error
        assert kind == "right", f"{kind}\n{generated.script(case)}"


def test_steps_of_every_kind_are_models() -> None:
    """Each kind of step finds a shape at which it does something."""
    silent = {
        kind
        for kind in generated.KINDS
        if not any(_does_something(kind, selection, shape) for shape in generated.SHAPES for selection in range(9))
    }
    assert not silent


def _does_something(kind: str, selection: int, shape: tuple[int, ...]) -> bool:
    before = (("linear", selection), ("activation", selection))
    with_it, without = (generated.written(Case(steps, shape)).lines for steps in ((*before, (kind, selection)), before))
    return len(with_it) > len(without)


def test_a_failing_case_is_made_smaller() -> None:
    case = replace(
        generated.draw(3), steps=tuple((kind, 5) for kind in ("linear", "activation", "free", "flip", "gate"))
    )
    small = generated.smaller(case, lambda c: any(kind == "free" for kind, _ in c.steps))
    assert small.steps == (("free", 5),)
    assert (small.dtype, small.forced, small.parts, small.batch) == ("float64", None, 0, 2)


def test_the_script_of_a_case_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "case.py"
    file.write_text(generated.script(Case((("linear", 1), ("activation", 2)), (3,))))
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, file], env=os.environ | paths, capture_output=True, text=True, check=True)
    assert ran.stdout == "right\n"
