"""The command line: fxcurv compute | show | check | explain | codes | demo | env.

Exit codes: 0 done or passed, 1 findings of `check`, 2 wrong usage or a refusal.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from fxcurv import api
from fxcurv.cli import demo
from fxcurv.cli.check import add_check, add_codes, add_explain
from fxcurv.core.errors import FxcurvError, InputError, a_value
from fxcurv.core.version import __version__
from fxcurv.dataset.processes import process_group
from fxcurv.inspect.picture import Format
from fxcurv.inspect.tables import family_of, tabular
from fxcurv.losses.base import KINDS as LOSSES
from fxcurv.losses.base import as_loss
from fxcurv.models import data, targets
from fxcurv.models.examples import example, like, shape_of_one
from fxcurv.quantities.registry import NAMES

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; on an error, print one line to stderr and return 2, to distinguish it from findings."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["rules"]:
        print("fxcurv rules is now called fxcurv codes", file=sys.stderr)
        given[0] = "codes"
    arguments = _parser().parse_args(given)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except FxcurvError as error:
        print(f"fxcurv: {error}", file=sys.stderr)
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        print(f"fxcurv: unexpected {type(error).__name__}: {error}; see --traceback [FXC904]", file=sys.stderr)
    return 2


# Commands ---------------------------------------------------------------------------------------------------------


def _compute(arguments: argparse.Namespace) -> int:
    if arguments.save and not arguments.save.parent.is_dir():
        raise InputError(
            f"there is no folder {arguments.save.parent}", remedy="create it, or choose another --save", code="FXC007"
        )
    target = targets.resolve(arguments.target, seed=arguments.seed)
    model, loss, held = target.model, as_loss(arguments.loss), like(target)
    batch = data.load(arguments.data, _batch(arguments), shape_of_one(target, arguments.input), seed=arguments.seed)
    compiled = api.compile(model, loss, _names(arguments.quantities), memory_budget=arguments.memory_budget)
    inputs, generator = batch.inputs.to(held), torch.Generator(held.device).manual_seed(arguments.seed)
    y = loss.target_from(batch.targets, _output(model, inputs), generator)
    with process_group() as (rank, size):
        if size == 1:
            result = compiled(inputs, y, generator, progress=True)
        else:  # every process computes a share; only rank 0 prints
            share = [(inputs[rank::size], y[rank::size])] if rank < len(y) else []
            result = compiled.accumulate(share, generator=generator.manual_seed(arguments.seed + rank))
    if rank:
        return 0
    print(f"{target.name}: {batch.description}\n{result}")
    if arguments.save:
        result.save(arguments.save)
        print(f"wrote {arguments.save}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    target = targets.resolve(arguments.target, seed=arguments.seed)
    compiled = api.compile(
        target.model,
        arguments.loss,
        _names(arguments.quantities),
        example_inputs=example(target, arguments.input),
        on_unsupported="error" if arguments.format == "text" else "skip",  # a picture shows refused parameters
    )
    if arguments.cost:
        return _written(f"{compiled.explain()}\n", arguments.output)
    if arguments.format != "text":
        return _written(f"{compiled.picture(arguments.format, arguments.depth)}\n", arguments.output)
    asked, families = arguments.stage.split(","), {name: family_of(name) for name in compiled.stages}
    for name in asked:
        if name not in {*families, *families.values()}:
            raise InputError(
                f"no stage is called {name!r}",
                remedy=f"there are {', '.join(name for name in families if ':' not in name)}",
                code="FXC007",
            )
    stages = {name: gm for name, gm in compiled.stages.items() if name in asked or families[name] in asked}
    tables = (f"{name}\n{gm.code if arguments.code else tabular(gm)}\n\n" for name, gm in stages.items())
    return _written("".join(tables), arguments.output)


def _written(text: str, file: Path | None) -> int:
    """Print the text, or write it to a file."""
    if file is None:
        print(text, end="")
        return 0
    if not file.parent.is_dir():
        raise InputError(
            f"there is no folder {file.parent}", remedy="create it, or choose another --output", code="FXC007"
        )
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    demo.run(arguments.output, seed=arguments.seed)
    return 0


def _env(arguments: argparse.Namespace) -> int:
    cuda = torch.version.cuda if torch.cuda.is_available() else "not available"
    print(f"python {platform.python_version()} on {platform.platform()}")
    print(f"fxcurv {__version__}, {torch.get_num_threads()} threads, CUDA {cuda}")
    for package in (
        "torch",
        "torchvision",
        "timm",
        "networkx",
        "tabulate",
        "tqdm",
        "safetensors",
        "scikit-learn",
        "matplotlib",
    ):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    return 0


# Shared by commands -----------------------------------------------------------------------------------------------


def _names(quantities: str) -> list[str]:
    return [name.strip() for name in quantities.split(",") if name.strip()]


def _batch(arguments: argparse.Namespace) -> int:
    default = 2 if arguments.data == "photos" else 8
    return default if arguments.batch is None else arguments.batch


def _output(model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        with torch.enable_grad():  # models register hooks on tensors with gradients
            output = model(inputs)
    except Exception as error:
        raise InputError(
            f"the model fails on an input of shape {list(inputs.shape)}: {type(error).__name__}: {error}",
            remedy="give --input, e.g. --input 3x32x32",
            code="FXC007",
        ) from error
    if not isinstance(output, Tensor):
        raise InputError(
            f"the model returns {a_value(output)}, not a tensor",
            remedy="use fxcurv.compile(..., output=...) in Python",
            code="FXC105",
        )
    return output.detach()


# The parser -------------------------------------------------------------------------------------------------------

_TARGET = (
    "TARGET: torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory, each with ?key=value&…"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fxcurv", description="Curvature of neural networks: KFAC, diagonal GGN and relatives."
    )
    parser.add_argument("--version", action="version", version=f"fxcurv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, add: Callable[[argparse.ArgumentParser], None], help: str, epilog: str = "") -> None:
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog)
        sub.add_argument("--traceback", action="store_true", help="show the traceback of an unexpected error")
        add(sub)

    command("compute", _add_compute, "compute curvature of a model on a batch and print it per parameter", _TARGET)
    command("show", _add_show, "print the rewritten graphs of a model, forward and backward", _TARGET)
    command(
        "check", add_check, "report for every parameter and quantity: exact, named approximation, or refused", _CHECK
    )
    command("explain", add_explain, "explain a code and its remedy")
    command("codes", add_codes, "list all codes")
    command("demo", _add_demo, "train a small residual CNN on handwritten digits and look at its curvature")
    command("env", lambda sub: sub.set_defaults(command=_env), "print versions for a bug report")
    return parser


_CHECK = f"{_TARGET}, or a pattern such as timm:test_*. Exit codes: 0 passed, 1 findings, 2 wrong use."


def _add_compute(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, _compute)
    parser.add_argument("--batch", type=int, help="samples (default 8; 2 photos)")
    parser.add_argument(
        "--data", default="random", choices=get_args(data.DataName), help="real or random inputs (default random)"
    )
    parser.add_argument(
        "--memory-budget", metavar="SIZE", help="limit of additional memory, e.g. 2GiB (default: no limit)"
    )
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write every tensor to a file")


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, _show)
    parser.add_argument(
        "--stage",
        default="canonical,backward",
        help="captured, lowered, canonical, forward, backward (default canonical,backward)",
    )
    parser.add_argument("--code", action="store_true", help="print generated Python code instead of tables")
    parser.add_argument(
        "--cost", action="store_true", help="print the estimated cost of every node, and the alternatives"
    )
    parser.add_argument(
        "--format", default="text", choices=("text", *get_args(Format)), help="tables, or a picture of the modules"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="depth of module paths in a picture")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to a file")


def _add_model(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Add the options of commands on one model."""
    parser.set_defaults(command=run)
    parser.add_argument("target", metavar="TARGET")
    quantities = f"of {', '.join(NAMES)} (default kfac,diag_ggn)"
    parser.add_argument("--quantities", default="kfac,diag_ggn", metavar="Q,…", help=quantities)
    parser.add_argument("--loss", default="cross_entropy", choices=list(LOSSES))
    parser.add_argument(
        "--input", metavar="SHAPE", help="shape of one sample, e.g. 3x32x32 (default: shape given by the model)"
    )
    _add_seed(parser)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_demo)
    parser.add_argument(
        "--output", type=Path, default=Path("fxcurv-demo"), help="folder for tables and pictures (default fxcurv-demo)"
    )
    _add_seed(parser)


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of untrained weights, data and samples (default 0)")
