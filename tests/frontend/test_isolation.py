"""What tracing leaves as it was around it: streams, logs and the generators beside torch's."""

from __future__ import annotations

import logging
import random
import sys
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.frontend.isolation import generators_beside_torch, no_report_of_failure

LOG = logging.getLogger("torch.fxcurv_test")


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    """Hears what a logger of torch says."""
    heard = Listener()
    monkeypatch.setattr(LOG, "handlers", [heard])
    monkeypatch.setattr(LOG, "propagate", False)
    return heard


class GraphError(Exception):
    partial_fx_graph = "a graph"


def test_what_is_printed_and_logged_comes_afterwards(listener: Listener, capsys: pytest.CaptureFixture[str]) -> None:
    with no_report_of_failure():
        LOG.warning("mine")
        other = threading.Thread(target=LOG.warning, args=("another's",))
        other.start()
        other.join()
        sys.stderr.write("said\nNone\n")
        assert listener.heard == ["another's"]
        assert capsys.readouterr().err == ""
    assert listener.heard == ["another's", "mine"]
    assert capsys.readouterr().err == "said\nNone\n"
    LOG.warning("later")
    assert listener.heard[-1] == "later"


def test_of_a_failure_only_what_the_model_prints_remains(
    listener: Listener, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        LOG.error("a report")
        sys.stderr.write("said\na graph\na graph\n")
        raise GraphError

    with pytest.raises(GraphError), no_report_of_failure():
        fail()
    assert capsys.readouterr().err == "said\n"
    LOG.warning("later")
    assert listener.heard == ["later"]


def test_generators_are_put_back() -> None:
    def state() -> str:
        return repr((random.getstate(), np.random.get_state(legacy=False)))

    before = state()
    with generators_beside_torch() as have_moved:
        assert not have_moved()
        np.random.rand()
        assert have_moved()
    assert state() == before
    with generators_beside_torch() as have_moved:
        random.random()
        assert have_moved()
    assert state() == before


class Draws(nn.Module):
    """Draws at every call, as layers that are dropped at random do, and may compute with it."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts, self.layer = counts, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.random()
        return self.layer(x) * (drawn if self.counts else 1.0)


def test_a_draw_that_does_not_count_is_no_obstacle() -> None:
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    with torch.random.fork_rng(devices=[]):
        assert len(fxcurv.compile(Draws(counts=False))(x, y)["kfac"]) == 2
        with pytest.raises(fxcurv.CaptureError, match="random numbers of Python or NumPy"):
            fxcurv.compile(Draws(counts=True))(x, y)
