"""fxcurv.core.deprecation: every former public name works and says the new one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.cli.main import main


def test_policy_was_called_demands() -> None:
    with pytest.warns(DeprecationWarning, match="fxcurv.Demands is now called fxcurv.Policy"):
        assert fxcurv.Demands is fxcurv.Policy  # pyright: ignore[reportAttributeAccessIssue]
    model = nn.utils.skip_init(nn.Linear, 2, 2)
    with pytest.warns(DeprecationWarning, match="demands is now called policy"):
        report = fxcurv.check(model, torch.zeros(2, 2), demands=fxcurv.Policy())  # pyright: ignore[reportCallIssue]
    assert report.ok


def test_attributes_of_blocks() -> None:
    eye = torch.eye(2).unsqueeze(0)
    block = fxcurv.Eigenbasis((2, 2), eye, eye, torch.ones(1, 2, 2), null_eigenvalue=0.5, in_out=True)
    with pytest.warns(DeprecationWarning, match=r"Eigenbasis.inputs_first is now called .in_out"):
        assert block.inputs_first is True
    with pytest.warns(DeprecationWarning, match=r"Eigenbasis.rest is now called .null_eigenvalue"):
        assert block.rest == 0.5


def test_a_process_group_was_joined() -> None:
    with pytest.warns(DeprecationWarning, match="joined is now called process_group"):
        joined = fxcurv.distributed.joined  # pyright: ignore[reportAttributeAccessIssue]
    assert joined is fxcurv.distributed.process_group  # pyright: ignore[reportAttributeAccessIssue]


def test_codes_were_called_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codes"]) == 0
    codes = capsys.readouterr().out
    assert main(["rules"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (codes, "fxcurv rules is now called fxcurv codes\n")
