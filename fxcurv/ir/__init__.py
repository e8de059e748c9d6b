"""The intermediate representation: operators of the canonical graph, their derivative rules, and the backward
operators.

A new operator is a module in `ops`, a row in `rules`, a row in `passes.lowerings` and a sample in the tests. `calls`
are operators without a row, `closed_form_vjps` closed forms of their pullbacks, `backward_ops` the modules of the
emitted graphs, `grammar` the legal nodes of each stage, `rewriting` the engine of passes. Imports go to
`fxcurv.contractions` and the rooms below it.
"""
