"""Settings: the command line before the environment before pyproject.toml, and errors that name the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fxcurv.checks.anchors import repository
from fxcurv.checks.policy import Allowance
from fxcurv.cli.config import Settings, load, options
from fxcurv.core.errors import Frame, InputError

PROJECT = """
[project]
name = "nets"

[tool.fxcurv]
quantities = ["grad"]
level = "static"
min_coverage = 0.5
timeout = 30
allow = [{ code = "FXC320", reason = "large" }]

[[tool.fxcurv.target]]
name = "nets:small"
input = "3x8x8"
allow = [{ code = "FXC401", parameter = "head.*", reason = "centred" }]

[[tool.fxcurv.target]]
name = "nets:large"
level = "numeric"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".git").mkdir()
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    inner = tmp_path / "src" / "nets"
    inner.mkdir(parents=True)
    return inner


def test_the_command_line_comes_before_the_environment_before_the_project(project: Path) -> None:
    environment = {"FXCURV_LEVEL": "numeric", "FXCURV_MIN_COVERAGE": "0.25", "HOME": "/root"}
    read = load({"min_coverage": "0.125", "jobs": "3", "exit_zero": True}, environment, project)
    common = read.common
    assert (common.min_coverage, common.level, common.quantities) == (0.125, "numeric", ("grad",))
    assert (common.jobs, common.timeout, common.exit_zero, common.loss) == (3, 30, True, "cross_entropy")
    assert load({}, {}, project).common.level == "static"
    assert load({}, {}, None).common == Settings()


def test_a_target_comes_before_the_project_and_behind_the_command_line(project: Path) -> None:
    read = load({}, {}, project)
    small, large = read.targets
    assert (small.name, large.name) == ("nets:small", "nets:large")
    line = PROJECT.splitlines().index("[[tool.fxcurv.target]]") + 1
    assert small.listed == (Frame(str(project.parent.parent / "pyproject.toml"), line, ""),)
    assert (read.of(small).level, read.of(small).input) == ("static", "3x8x8")
    assert (read.of(large).level, read.of(large).input) == ("numeric", None)
    assert load({"level": "shape"}, {}, project).of(large).level == "shape"
    assert load({}, {"FXCURV_LEVEL": "shape"}, project).of(large).level == "shape"
    everywhere = Allowance("FXC320", "large")
    assert read.of(small).policy.allow == (everywhere, Allowance("FXC401", "centred", "head.*"))
    assert read.of(large).policy.allow == (everywhere,)


def test_the_root_is_that_of_the_repository(project: Path, tmp_path: Path) -> None:
    assert load({}, {}, project).root == tmp_path == repository(project)
    (project / "pyproject.toml").write_text("[tool.fxcurv]\nlevel = 'shape'\n")
    read = load({}, {}, project)
    assert (read.root, read.common.level) == (tmp_path, "shape"), "the nearest project of the one repository"


def test_every_setting_is_an_option() -> None:
    names = {option.name for option in options()}
    assert names == {f.name for f in dataclasses.fields(Settings)} - {"allow"}
    for option in options():
        assert option.help
        if option.choices is not None:
            assert option.read(option.choices[0]) == option.choices[0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('levle = "shape"', "pyproject.toml: tool.fxcurv.levle: there is no such key; did you mean 'level'?"),
        ('level = "shapes"', "tool.fxcurv.level cannot be 'shapes'; did you mean 'shape'?"),
        ("jobs = 0", "tool.fxcurv.jobs cannot be 0; give at least 1"),
        ("jobs = true", "tool.fxcurv.jobs cannot be True; give a number"),
        ("min_coverage = 2", "cannot be 2; give a number from 0 to 1"),
        ("exit_zero = 3", "cannot be 3; give true or false"),
        ('quantities = [1]', "cannot be .*; give names"),
        ('ignore = ["E5"]', "no code begins with E5"),
        ('also = ["pdf=a.pdf"]', "give FORMAT=FILE, the format one of text, json"),
        ('allow = [{ code = "FXC320" }]', "has no reason; add reason"),
        ('allow = [{ code = "FXC999", reason = "x" }]', "allow.FXC999: there is no such key"),
        ('allow = [{ code = "FXC320", reason = "x", line = 3 }]', "allow.line: .* no such key; choose one of code"),
        ('[[tool.fxcurv.target]]\ninput = "3"', "pyproject.toml:2: a target has no name"),
        ('[[tool.fxcurv.target]]\nname = "a:b"\njobs = 3', "pyproject.toml:2: jobs: there is no such key"),
        ("level = ", "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_broken_project_is_refused_by_key(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.fxcurv]\n{table}\n")
    with pytest.raises(InputError, match=message) as caught:
        load({}, {}, tmp_path)
    assert caught.value.code == "FXC008"
    assert caught.value.remedy


def test_broken_variables_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FXCURV_levle: there is no such key; did you mean 'level'"):
        load({}, {"FXCURV_LEVLE": "shape"}, tmp_path)
    with pytest.raises(InputError, match=r"--min-coverage cannot be 'half'; could not convert .*\[FXC007\]"):
        load({"min_coverage": "half"}, {}, tmp_path)
