"""The pages of the documentation: README.md and tools/docs/*.md, with their blocks of code, tables and links.

A page is run in one namespace of its own, block by block. Lines of `sh` blocks that call fxcurv run in process, in the
working directory; commands that install, test or run a tool are compared with pyproject.toml, CI and the files of the
repository. A `text` or `mermaid` block shows the output of the block before it; see `texts.matches` for how the two are
compared.
"""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from texts import matches

from fxcurv.cli import main as cli
from fxcurv.cli.config import load

__all__ = ["DOCS", "EXTRAS", "PAGES", "README", "ROOT", "Block", "Link", "Page", "command_of_ci", "run", "run_page"]

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@dataclass(frozen=True)
class Block:
    """A fenced block and the line of the page on which its content begins."""

    language: str
    content: str
    line: int


@dataclass(frozen=True)
class Link:
    """The target of a link to a file of the repository: its path, and the heading after `#`, each possibly empty."""

    path: str
    heading: str


@dataclass(frozen=True)
class Page:
    """A Markdown file of the repository."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[Block]:
        text = self.text
        found = re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE)
        return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]

    @property
    def prose(self) -> str:
        """The text without its blocks of code."""
        return re.sub(r"^```(?s:.*?)^```$", "", self.text, flags=re.MULTILINE)

    @property
    def links(self) -> list[Link]:
        """Every link and image whose target is a file, or a heading of this page."""
        targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", self.prose))
        return [Link(*target.partition("#")[::2]) for target in targets if not re.match(r"\w+:", target)]

    @property
    def headings(self) -> set[str]:
        """The anchors of the headings, as GitHub and myst-parser make them."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}

    def table(self, header: str) -> list[list[str]]:
        """The rows of the table that begins with `header`, cell by cell."""
        lines = self.text[self.text.index(f"\n{header}") + 1 :].splitlines()
        rows = itertools.takewhile(lambda line: line.startswith("|"), lines[2:])
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]

    def between(self, marker: str) -> str:
        """The text between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
        return self.text.partition(f"<!-- {marker}:begin -->")[2].partition(f"<!-- {marker}:end -->")[0].strip()


README = Page("README.md")
DOCS = {path.stem: Page(path.relative_to(ROOT).as_posix()) for path in sorted((ROOT / "tools" / "docs").glob("*.md"))}
"""The pages under tools/docs by file name, without the suffix."""
PAGES = (README, *DOCS.values())


# Running ----------------------------------------------------------------------------------------------------------


def run_page(page: Page, read: Callable[[], str]) -> dict[str, Any]:
    """Run every block of a page in one namespace, which is returned; `read` gives the output since its last call."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in page.blocks:
        if block.language in ("text", "mermaid"):
            assert matches(block.content, printed), f"{page.name}, line {block.line}: the code prints\n{printed}"
        else:
            run(block, namespace, page.name)
            printed = read()
    return namespace


def run(block: Block, namespace: dict[str, Any], name: str = "page") -> None:
    """Execute a block of code."""
    if block.language == "python":
        source = "\n" * (block.line - 1) + block.content  # a traceback then names the line of the page
        exec(compile(source, name, "exec"), namespace)
    elif block.language == "sh":
        for line in block.content.splitlines():
            command, _, comment = line.partition("#")
            expected = re.match(r" exits with (\d)", comment)
            for part in command.split("&&"):
                call(shlex.split(part), int(expected[1]) if expected else 0)
    elif block.language == "toml":
        Path("pyproject.toml").write_text(block.content, encoding="utf-8")
        assert load({}, {}, Path.cwd()).targets
        Path("pyproject.toml").unlink()
    elif block.language == "yaml":
        check_example(yaml.safe_load(block.content))
    else:
        pytest.fail(f"{name}, line {block.line}: a block in {block.language or 'no language'}: how is it tested?")


def check_example(example: dict[str, Any]) -> None:
    """The hook and the action that an example names exist, and the action has the inputs that it is given."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    for repository in example.get("repos", []):
        assert [hook["id"] for hook in repository["hooks"]] == [hook["id"] for hook in hooks]
    for step in example.get("steps", []):
        folder = step["uses"].partition("@")[0].partition("/fxcurv/")[2]
        action = yaml.safe_load((ROOT / folder / "action.yml").read_text(encoding="utf-8"))
        assert set(step["with"]) <= set(action["inputs"])


def call(words: Sequence[str], expected: int) -> None:
    """Run a command of fxcurv, or check one that is not for a test to run."""
    match words:
        case ["fxcurv", *arguments]:
            assert cli.main(arguments) == expected, shlex.join(words)
        case ["pip", "install", what]:
            extras = re.fullmatch(r"\.\[([\w,]+)\]", what)
            assert extras, f"{what}: give the extras of this clone"
            assert set(extras[1].split(",")) <= set(EXTRAS)
        case ["python", "-m", "pytest", *_]:
            assert shlex.join(words) == command_of_ci()
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            pytest.fail(f"{shlex.join(words)}: how is it tested?")


def command_of_ci() -> str:
    """What .ci/run takes out of the README: the first match of its pattern."""
    pattern = re.search(r"grep -m1 -oE '([^']+)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert pattern
    first = re.search(pattern[1].replace("[^", r"[^\n"), README.text)
    assert first
    return first[0].strip()


def named_tests(text: str) -> Iterator[tuple[str, str]]:
    """`file.py::test` as file and test."""
    yield from re.findall(r"`([\w/]+\.py)::(\w+)`", text)
