"""Every format of `fxcurv check` is valid against its schema, and says what was found and where."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from jsonschema import ValidationError, validators
from torch import Tensor, nn

import fxcurv
from fxcurv import checks
from fxcurv.checks import Allowance, Policy, Report
from fxcurv.checks.codes import CODES
from fxcurv.checks.formats import FORMATS

HERE = Path(__file__)


def in_halves(*layers: nn.Module) -> nn.Sequential:
    """The layers, with every parameter a half: drawn from no generator."""
    model = nn.Sequential(*layers).to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    return model


class Outcome(nn.Module):
    """A frozen parameter, exact ones, one whose samples mix, and one that is not used."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        with torch.device("meta"):
            self.body = in_halves(nn.Linear(3, 4))
            self.head, self.spare = in_halves(nn.Linear(4, 2)), in_halves(nn.Linear(2, 2))
        self.body[0].bias.requires_grad_(False)
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y - y.mean(0) if self.centred else y)


LINE = next(n for n, line in enumerate(HERE.read_text().splitlines(), 1) if "y - y.mean(0) if" in line)
X = torch.ones(2, 3)


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """One that fails, one that passes, and one whose finding is allowed."""
    allow = (Allowance("FXC401", "50 % | centred: on purpose"),)
    return [
        fxcurv.check(Outcome(centred=True), X, target="nets.py:first"),
        fxcurv.check(Outcome(centred=False), X, "kfac", target="nets.py:second"),
        fxcurv.check(Outcome(centred=True), X, "kfac", target="nets.py:third", policy=Policy(allow=allow)),
    ]


def valid(document: Any, schema: Path) -> Any:
    """The document, if the schema takes it, formats included."""
    rules = json.loads(schema.read_text(encoding="utf-8"))
    kind = validators.validator_for(rules)
    kind.check_schema(rules)
    kind(rules, format_checker=kind.FORMAT_CHECKER).validate(document)
    return document


def test_json_is_what_its_schema_says(reports: list[Report]) -> None:
    schema = Path(checks.__file__).parent / "schema.json"
    document = valid(json.loads(FORMATS["json"](reports)), schema)
    assert [target["ok"] for target in document["targets"]] == [False, True, True]
    assert document["summary"] | {"seconds": 0} == {
        "ok": False,
        "targets": 3,
        "failed": 1,
        "statuses": {"unsupported": 3, "frozen": 4, "exact": 9, "unreached": 8},
        "codes": {"FXC401": 2, "FXC430": 8},
        "suppressed": 1,
        "seconds": 0,
    }
    row = next(row for row in document["rows"] if row["code"] == "FXC401")
    assert (row["parameter"], row["file"], row["line"]) == ("body.0.weight", "tests/checks/test_formats.py", LINE)
    for broken in ({"status": "fine"}, {"code": "E501"}, {"line": 0}, {"colour": "red"}, {"severity": "fatal"}):
        document["rows"][0] |= broken
        with pytest.raises(ValidationError):
            valid(document, schema)
        document["rows"][0] = dict(document["rows"][1])


def test_jsonl_is_a_row_a_line(reports: list[Report]) -> None:
    lines = FORMATS["jsonl"](reports).splitlines()
    assert [json.loads(line) for line in lines] == json.loads(FORMATS["json"](reports))["rows"]


def test_csv_is_a_line_per_target(reports: list[Report]) -> None:
    first, second, third = csv.DictReader(FORMATS["csv"](reports).splitlines())
    assert (first["model"], first["input"], first["param_count"]) == ("nets.py:first", "2x3:float32", "32")
    assert (first["kfac_exact"], first["kfac_unsupported"], first["diag_ggn_unsupported"]) == ("2", "1", "1")
    assert (second["kfac_exact"], second["kfac_frozen"], second["kfac_unreached"]) == ("3", "1", "2")
    assert [row["ok"] for row in (first, second, third)] == ["False", "True", "True"]
    assert float(first["coverage"]) == pytest.approx(10 / 22, abs=1e-6)
    assert float(second["coverage"]) == 1


def test_sarif_is_valid_and_points_at_the_line(reports: list[Report]) -> None:
    document = valid(json.loads(FORMATS["sarif"](reports)), HERE.parent / "sarif.schema.json")
    (run,) = document["runs"]
    rules, results = run["tool"]["driver"]["rules"], run["results"]
    assert [rule["id"] for rule in rules] == ["FXC401", "FXC430"]
    assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in results)
    assert [result["level"] for result in results if result["ruleId"] == "FXC430"] == ["note"] * 8
    errors = [result for result in results if result["level"] == "error"]
    assert len(errors) == 3
    for result in errors:
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"] == {"uri": "tests/checks/test_formats.py"}
        assert location["physicalLocation"]["region"] == {"startLine": LINE, "startColumn": 9}
        assert location["logicalLocations"][0]["fullyQualifiedName"].endswith("/body.0.weight")
    assert [result.get("suppressions") for result in errors] == [
        None,
        None,
        [{"kind": "external", "justification": "allowed: 50 % | centred: on purpose"}],
    ]
    assert len({result["partialFingerprints"]["fxcurv/v1"] for result in results}) == len(results)


def test_junit_has_a_case_per_parameter_and_quantity(reports: list[Report]) -> None:
    root = ET.fromstring(FORMATS["junit"](reports))
    assert root.tag == "testsuites"
    allowed = {"testsuite": {"testcase"}, "testcase": {"failure", "error", "skipped"}}
    for parent in root.iter():
        assert {child.tag for child in parent} <= allowed.get(parent.tag, {"testsuite"} if parent is root else set())
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == [report.target for report in reports]
    for suite, report in zip(suites, reports, strict=True):
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == [f"{row.quantity}[{row.parameter}]" for row in report.rows]
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(attribute) == str(len(suite.findall(f"testcase/{tag}")))
        assert suite.get("tests") == str(len(cases))
        assert float(suite.get("time", "")) >= 0
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("24", "2", "0")
    failure = suites[0].find("testcase/failure")
    assert failure is not None
    assert failure.get("type") == "FXC401"
    assert f"tests/checks/test_formats.py:{LINE}" in str(failure.text)
    skipped = {case.get("message") for case in suites[2].findall("testcase/skipped")}
    assert skipped == {"frozen", "allowed: 50 % | centred: on purpose"}


def test_github_shows_each_reason_once_at_its_line(reports: list[Report]) -> None:
    first, *rest = FORMATS["github"](reports).splitlines()
    place = f"file=tests/checks/test_formats.py,line={LINE},col=9"
    assert first.startswith(f"::error title=fxcurv (FXC401),{place}::nets.py:first: body.0.weight: node 'mean'")
    assert "%0A  help: make each sample" in first
    assert [line.partition(" ")[0] for line in rest] == ["::notice"] * 3
    assert all("spare.0.weight and 1 more: the output does not depend on it" in line for line in rest)


def test_github_properties_are_escaped() -> None:
    report = fxcurv.check(Outcome(centred=True), X, "grad", target="a,b:c%d\ne")
    said = FORMATS["github"]([report]).splitlines()[0].partition("::")[2].partition("::")[2]
    assert said.startswith("a,b:c%25d%0Ae: body.0.weight: ")


def test_markdown_has_a_table_of_targets_and_one_of_findings(reports: list[Report]) -> None:
    page = FORMATS["markdown"](reports)
    targets, findings = (part for part in page.split("\n\n") if part.startswith("|"))
    assert [line.split("|")[2].strip() for line in targets.splitlines()[2:]] == ["❌", "✅", "✅"]
    assert len(findings.splitlines()) == 2 + 4
    assert f"`tests/checks/test_formats.py:{LINE}`" in findings
    assert {line.count("|") for line in targets.splitlines()} == {7}


def test_text_tells_what_is_suppressed_and_why(reports: list[Report]) -> None:
    assert "  1 suppressed: allowed: 50 % | centred: on purpose" in FORMATS["text"](reports)
    assert str(reports[0]) == FORMATS["text"](reports[:1])


def test_a_report_without_findings_is_valid_everywhere() -> None:
    report = fxcurv.check(in_halves(nn.Linear(3, 2, device="meta")), X, "grad")
    assert report.findings == ()
    assert FORMATS["github"]([report]) == ""
    (run,) = valid(json.loads(FORMATS["sarif"]([report])), HERE.parent / "sarif.schema.json")["runs"]
    assert run["results"] == run["tool"]["driver"]["rules"] == []
    assert ET.fromstring(FORMATS["junit"]([report])).get("failures") == "0"
    assert set(CODES) >= {row.code for row in report.rows if row.code}
