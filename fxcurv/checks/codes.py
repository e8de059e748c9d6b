"""The closed table of codes: what each means, of what kind it is, how severe, and what to do. Codes are never reused.

FXC0xx usage and environment, 1xx capture, 2xx lowering, 3xx rules, 4xx semantics, 5xx cost, 9xx defects.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from fxcurv.errors import QuantityError

__all__ = ["CODES", "Code", "Kind", "Severity", "as_json", "explain"]

Severity = Literal["error", "warning", "note"]
Kind = Literal["unsupportable", "not-yet", "replace", "misconfigured", "defect", "information"]
"""Who can mend it: nobody (it has no meaning), fxcurv later, the model, the call, fxcurv now; or nothing is broken."""


@dataclass(frozen=True)
class Code:
    """One thing that an error or a finding can say."""

    code: str
    title: str
    kind: Kind
    severity: Severity
    explanation: str
    remedy: str

    def __str__(self) -> str:
        body = textwrap.fill(self.explanation, 100)
        return f"{self.code}  {self.title}  ({self.kind}, {self.severity})\n\n{body}\n\nRemedy: {self.remedy}"


def explain(code: str) -> Code:
    """The row of a code, in any case."""
    if code.upper() in CODES:
        return CODES[code.upper()]
    close = difflib.get_close_matches(code.upper(), CODES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`fxcurv rules` lists all codes"
    raise QuantityError(f"there is no code {code!r}", remedy=hint, code="FXC007")


def as_json(codes: Iterable[Code]) -> str:
    """The table for machines."""
    return json.dumps([asdict(code) for code in codes], indent=2)


def _error(code: str, title: str, kind: Kind, explanation: str, remedy: str) -> Code:
    return Code(code, title, kind, "error", explanation, remedy)


_TABLE = (
    # Usage and environment: `fxcurv check` exits with 2 ---------------------------------------------------------------
    _error(
        "FXC001",
        "malformed target",
        "misconfigured",
        "A target is torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory, each with "
        "?key=value&key=value behind it. Values are Python literals; anything else is a string.",
        "write the target in one of these forms",
    ),
    _error(
        "FXC002",
        "no such target",
        "misconfigured",
        "The library, module or file that the target names has no model or factory of that name, or a pattern with * "
        "matches none.",
        "correct the name; the error suggests those that are close",
    ),
    _error(
        "FXC003",
        "the target cannot be imported",
        "misconfigured",
        "Importing the module or file of the target raises an exception.",
        "run the same import in Python; install what is missing, or run from the folder in which it can be imported",
    ),
    _error(
        "FXC004",
        "the target cannot be built",
        "misconfigured",
        "The factory raises an exception on the given keyword arguments, or returns something that is no "
        "torch.nn.Module.",
        "correct the keyword arguments behind the ?, or the factory",
    ),
    _error(
        "FXC005",
        "weights are not here",
        "misconfigured",
        "Nothing is ever downloaded: ?weights= names a state dict on this machine, or weights that an installed "
        "package ships; and they must fit the model tensor by tensor.",
        "give ?weights=FILE with a state dict of this very model, or leave it out",
    ),
    _error(
        "FXC006",
        "an optional package is missing",
        "misconfigured",
        "The request needs a package that is not installed, or that is built for another torch.",
        "install what the error says",
    ),
    _error(
        "FXC007",
        "wrong use of an option",
        "misconfigured",
        "An option has a value that it cannot have, or one that is needed is missing, such as the shape of one input "
        "for a model that does not say it.",
        "see fxcurv COMMAND --help",
    ),
    _error(
        "FXC008",
        "broken configuration or baseline",
        "misconfigured",
        "[tool.fxcurv] of pyproject.toml, an FXCURV_… variable or the baseline holds an unknown key or a value of the "
        "wrong type, or is not readable.",
        "correct the key or value that the error names",
    ),
    _error(
        "FXC009",
        "no such data",
        "misconfigured",
        "The data set is unknown, or its inputs do not fit the shape that the model takes.",
        "choose another --data, or use random data",
    ),
    _error(
        "FXC010",
        "the demo did not learn",
        "misconfigured",
        "The demo's network stayed below the accuracy that its pictures need.",
        "choose another --seed",
    ),
    # Capture ----------------------------------------------------------------------------------------------------------
    _error(
        "FXC101",
        "control flow depends on values",
        "replace",
        "forward branches or loops on the values of a tensor. The graph that is traced would be right for some inputs "
        "only.",
        "decide on shapes or constants, or select with torch.where",
    ),
    _error(
        "FXC102",
        "the model cannot be traced",
        "replace",
        "torch.export fails on forward. Often the input has another shape than the model takes; otherwise forward "
        "does what no graph can hold.",
        "check the shape of the input; then the line that the finding names",
    ),
    _error(
        "FXC103",
        "the model cannot be copied",
        "replace",
        "Tracing works on a copy of the modules that shares their tensors, so that the model itself stays as it is.",
        "make every attribute of the model deep-copyable",
    ),
    _error(
        "FXC104",
        "a block with a graph of its own",
        "replace",
        "A block inside of forward, such as torch.cond or autocast, puts a graph into the graph.",
        "use torch.where instead of torch.cond, and no autocast inside of forward",
    ),
    _error(
        "FXC105",
        "the model returns no single tensor",
        "misconfigured",
        "The loss takes one tensor; the model returns several, or something else.",
        "choose one with output=: an index, a name, or a function of what the model returns",
    ),
    _error(
        "FXC106",
        "a fixed batch size",
        "replace",
        "forward works for one batch size only. Curvature is compiled once for all of them.",
        "reshape with -1 or x.shape[0]",
    ),
    _error(
        "FXC110",
        "the inputs are no batch",
        "misconfigured",
        "The inputs are a tensor, a tuple (positional) or a dict (keywords), and share their first axis, of at least "
        "one sample.",
        "give every input a leading batch axis of the same length",
    ),
    _error(
        "FXC111",
        "inputs of the wrong type or place",
        "misconfigured",
        "Inputs must be of the type that the model computes with, and on its device.",
        "convert or move them, as the error says",
    ),
    _error(
        "FXC112",
        "inputs are not finite",
        "misconfigured",
        "The input holds NaN or infinity, and so would every result.",
        "clean the data",
    ),
    # Lowering ---------------------------------------------------------------------------------------------------------
    _error(
        "FXC201",
        "the input is overwritten",
        "replace",
        "forward writes into its input in place, which belongs to the caller.",
        "give the first op inplace=False, or clone the input",
    ),
    _error(
        "FXC202",
        "an in-place op without a functional form",
        "replace",
        "The op writes in place, and there is no operator that returns what it writes, or it writes through a view "
        "that cannot be replayed.",
        "write it out of place: x = op(x)",
    ),
    _error(
        "FXC203",
        "a call that is no operator",
        "replace",
        "The graph holds a call that is neither an ATen operator nor of the vocabulary.",
        "keep such calls out of forward",
    ),
    _error(
        "FXC204",
        "a size depends on the batch size",
        "replace",
        "A size or an argument depends on the batch size otherwise than as a multiple along one axis, so it cannot be "
        "told which sample an entry belongs to.",
        "keep samples along one axis, and compute constants from values instead of sizes",
    ),
    _error(
        "FXC205",
        "the batch axis is cut",
        "unsupportable",
        "forward takes some of the samples and leaves others: those have no curvature of their own.",
        "keep every sample, or cut the batch before the model sees it",
    ),
    _error(
        "FXC206",
        "data become integers",
        "unsupportable",
        "Data on the way from a parameter to the loss are converted to a type that has no derivative.",
        "keep them in floating point",
    ),
    _error(
        "FXC207",
        "the output is no function of the input",
        "unsupportable",
        "What the model returns is a constant or a number.",
        "return a tensor that depends on the input",
    ),
    _error(
        "FXC208",
        "a value is computed from the batch size",
        "unsupportable",
        "forward computes with the number of samples, so that what it returns for a sample depends on how many others "
        "there are.",
        "let no value depend on the number of samples",
    ),
    _error(
        "FXC209",
        "a complex parameter",
        "not-yet",
        "Curvature is defined here for real parameters.",
        "hold real and imaginary parts in a real parameter, and view it as complex",
    ),
    _error(
        "FXC210",
        "bags of different lengths",
        "not-yet",
        "Samples of nn.EmbeddingBag must hold equally many indices, so that their batch has an axis of its own.",
        "give indices [N, T] without offsets",
    ),
    _error(
        "FXC211",
        "a number is read out of a tensor",
        "replace",
        "forward makes a number of values that depend on the input or a parameter, and computes with it: it has no "
        "derivative, and is the same for all samples of a batch.",
        "compute with the tensor itself, without .item(), float() or .tolist()",
    ),
    _error(
        "FXC212",
        "a size depends on values",
        "replace",
        "How many entries a tensor has depends on the values of another, as with nonzero, unique or an index by a "
        "mask, so that it cannot be told which sample an entry belongs to.",
        "keep all entries, and multiply by a mask or use torch.where",
    ),
    # Rules ------------------------------------------------------------------------------------------------------------
    _error(
        "FXC301",
        "an op without a rule",
        "not-yet",
        "No derivative rule is declared for a module of the rewritten graph.",
        "declare one in fxcurv/rules.py",
    ),
    _error(
        "FXC302",
        "two rules for one op",
        "misconfigured",
        "The table of rules has one row per module.",
        "keep one of the two rows",
    ),
    Code(
        "FXC320",
        "an approximation under a name",
        "information",
        "warning",
        "The parameter has no Kronecker form, and its dense block would be larger than "
        "fxcurv.quantities.DENSE_LIMIT. What is reported instead says its name in the status.",
        "accept it (--require approx), allow it with a reason, or ask for diag_ggn, which is exact",
    ),
    Code(
        "FXC321",
        "a slower way",
        "information",
        "warning",
        "The compiled graph does not reach the parameter in a form that it knows; its value comes from autograd on "
        "the model itself, one column of one sample at a time: right, but slow.",
        "accept it (--require any), or change the line that the finding names",
    ),
    _error(
        "FXC322",
        "a parameter without this quantity",
        "not-yet",
        "The quantity cannot be computed for this parameter, neither exactly nor under a name.",
        "ask for another quantity of it, or freeze it",
    ),
    # Semantics --------------------------------------------------------------------------------------------------------
    _error(
        "FXC401",
        "samples mix",
        "unsupportable",
        "Curvature of a sum over samples needs every output to depend on its own sample alone. Here an output of one "
        "sample depends on another: a statistic over the batch, a softmax over axis 0, an N×N product.",
        "let each sample's output depend on that sample alone",
    ),
    _error(
        "FXC402",
        "BatchNorm in training mode",
        "misconfigured",
        "Statistics of the batch couple its samples, and updating a buffer makes a call depend on the calls before.",
        "call model.eval(); replace BatchNorm without running statistics; keep state out of forward",
    ),
    _error(
        "FXC403",
        "dropout in training mode",
        "misconfigured",
        "The model draws at random, or its output changes from call to call, so that it has no single curvature.",
        "call model.eval()",
    ),
    _error(
        "FXC404",
        "samples are not along axis 0 of the output",
        "replace",
        "The loss reads samples along axis 0 of what the model returns.",
        "return the samples along axis 0",
    ),
    _error(
        "FXC405",
        "the output is not finite",
        "misconfigured",
        "The model returns NaN or infinity at this batch.",
        "check its parameters and the scale of the input",
    ),
    _error(
        "FXC406",
        "the loss is not supported",
        "not-yet",
        "Supported are nn.CrossEntropyLoss, nn.MSELoss and nn.BCEWithLogitsLoss, reduction mean or sum, weights that "
        "are not negative, on an output of a shape that they take.",
        "use one of these",
    ),
    _error(
        "FXC407",
        "targets do not fit",
        "misconfigured",
        "The targets have a shape, a type or values that the loss does not take for this output.",
        "give the targets that the error describes",
    ),
    _error(
        "FXC408",
        "nothing is trainable",
        "misconfigured",
        "No parameter of the model has requires_grad set: there is nothing to compute.",
        "set requires_grad_(True) on some",
    ),
    _error(
        "FXC409",
        "no such quantity",
        "misconfigured",
        "A quantity is one of the names in fxcurv.NAMES, or an object such as fxcurv.KFAC(), with options that it has.",
        "choose one that exists",
    ),
    _error(
        "FXC410",
        "no such result",
        "misconfigured",
        "A quantity, a parameter or a stage was looked up that was not computed.",
        "look up one of those that the error lists",
    ),
    _error(
        "FXC411",
        "a vector of another size",
        "misconfigured",
        "A block acts on vectors with as many entries as its parameter.",
        "give a vector of the block's shape, or flat",
    ),
    _error(
        "FXC412",
        "the factor does not fit the loss",
        "misconfigured",
        "Stratified draws classes, so that it is for cross entropy only, and with k=0 columns for the classes that are "
        "not among the likeliest it would leave these out.",
        "choose another factor, or other numbers of columns",
    ),
    _error(
        "FXC413",
        "the backend cannot compile a graph",
        "not-yet",
        "torch.compile failed on the forward or a backward graph: it cannot read an operator, or its compiler, which "
        "needs a C++ compiler on CPUs and Triton on GPUs, does not work here.",
        'use backend="eager", which computes the same',
    ),
    _error(
        "FXC420",
        "no inverse",
        "misconfigured",
        "A matrix without damping has no inverse to rounding, or is not positive definite where it is factorised.",
        "give damping > 0, of the scale of the block's eigenvalues",
    ),
    _error(
        "FXC421",
        "wrong damping",
        "misconfigured",
        "A damping is a finite number, 0 or above, and is applied in one of the ways plain, pi and exact.",
        "give one that the error describes",
    ),
    _error(
        "FXC422",
        "blocks that do not add up",
        "misconfigured",
        "The sum of two blocks has none of their forms, or a factor is negative.",
        "add their as_dense(), which takes numel² numbers",
    ),
    _error(
        "FXC423",
        "no file of a result",
        "misconfigured",
        "The file is none that Curvature.save wrote, is of another schema, truncated, or contradicts itself; or a "
        "block has a form that no file holds.",
        "save the result anew, or update fxcurv",
    ),
    _error(
        "FXC424",
        "a result of another model",
        "misconfigured",
        "The parameters of the model have other names, shapes or types than those that the result is of.",
        "give the model that it was computed for",
    ),
    _error(
        "FXC425",
        "results that do not merge",
        "misconfigured",
        "Results of two batches add where they are of one model, loss and choice of quantities, whose values add over "
        "batches.",
        "merge results as they are returned, of the same compile()",
    ),
    _error(
        "FXC426",
        "not defined for this operator",
        "misconfigured",
        "A gradient, or a quantity without a value for some parameter, is no operator; sums need operators on the same "
        "parameters, eigenvalues a square one, estimates at least one vector.",
        "ask what the error describes",
    ),
    _error(
        "FXC427",
        "a checkpoint of another accumulation",
        "misconfigured",
        "A checkpoint continues the call that wrote it: the same model at the same values, loss, quantities, options, "
        "generator and batches in the same order.",
        "repeat that call, or choose another path",
    ),
    _error(
        "FXC428",
        "a process of the group failed",
        "misconfigured",
        "A process raised an error, ended, or gave no sign of life for longer than the timeout, so that there is no "
        "result over all of them.",
        "look at the error of the process that is named; give a longer timeout= if a batch takes that long",
    ),
    _error(
        "FXC429",
        "parameters that are distributed",
        "not-yet",
        "A parameter is a DTensor, of which every process holds a part. Graphs here compute with whole parameters.",
        "give a model whose parameters are whole, such as one that is replicated",
    ),
    Code(
        "FXC430",
        "the output does not depend on it",
        "information",
        "note",
        "The parameter is trainable, but the output of the model is no differentiable function of it: its curvature "
        "is zero, and so is its gradient. Often it is a layer that forward no longer calls.",
        "remove it, freeze it, or use it",
    ),
    _error(
        "FXC431",
        "data that change between two passes",
        "misconfigured",
        "What is computed takes the same data twice, and the second time they are others: another number of samples, "
        "another loss, or other batches of a loader of which only some are read.",
        "augment and shuffle by torch's global generator, which is set back, or give data that stay the same",
    ),
    _error(
        "FXC440",
        "a recipe used wrongly",
        "misconfigured",
        "A recipe of fxcurv.recipes was given a number out of its range, or a result or operator of another kind than "
        "it takes.",
        "give what the error describes",
    ),
    # Cost -------------------------------------------------------------------------------------------------------------
    _error(
        "FXC501",
        "the check took too long",
        "misconfigured",
        "Checking the target took longer than --timeout seconds and was ended.",
        "give more time, a smaller input, or --level static",
    ),
    _error(
        "FXC502",
        "malformed memory budget",
        "misconfigured",
        "A memory budget is a positive whole number of bytes, or a number and one of the units KB, MB, GB, KiB, MiB "
        "and GiB.",
        "write it in one of these forms",
    ),
    _error(
        "FXC503",
        "the memory budget is too small",
        "misconfigured",
        "With one sample and one column at a time, the call would still need more memory than it may take: what the "
        "pullback keeps of one sample, and the results themselves, have to fit.",
        "allow what the error says, or ask for fewer quantities or parameters at once",
    ),
    # Defects ----------------------------------------------------------------------------------------------------------
    _error(
        "FXC901",
        "a graph breaks the grammar of its stage",
        "defect",
        "A pass of fxcurv produced a graph that the next one must not see.",
        "report it, with the model",
    ),
    _error(
        "FXC902",
        "the process of a check ended",
        "defect",
        "The process in which a target was checked died: out of memory, or a crash in compiled code.",
        "run this target alone with --jobs 1; if memory is short, with a smaller input or --level static",
    ),
    _error(
        "FXC903",
        "the numbers disagree",
        "defect",
        "In float64, a value that was computed differs from that of autograd on the model itself by more than "
        "rounding can explain.",
        "report it, with the model; do not use the number",
    ),
    _error(
        "FXC904",
        "an unexpected exception",
        "defect",
        "Something failed that no check foresaw.",
        "run it with --traceback, and report what it prints",
    ),
    Code(
        "FXC905",
        "not verified",
        "information",
        "warning",
        "Autograd on the model itself finds the value in another form than the compiled graph, such as a dense block "
        "instead of Kronecker factors, so that the two cannot be compared.",
        "compare diag_ggn or grad of the parameter instead",
    ),
)

CODES: dict[str, Code] = {row.code: row for row in _TABLE}
"""Every code, in order."""
