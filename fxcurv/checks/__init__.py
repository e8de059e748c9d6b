"""Checks of curvature compatibility, for a model and for a change to it: findings, codes, formats, policy."""

from fxcurv.checks.levels import check as check
from fxcurv.checks.policy import Allowance as Allowance
from fxcurv.checks.policy import Policy as Policy
from fxcurv.checks.report import Report as Report
from fxcurv.checks.report import Row as Row
