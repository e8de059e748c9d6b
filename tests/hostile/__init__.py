"""Hostile models: constructs that a trace of the model does not see, around small random networks.

- `constructs`: the row of a construct; `gradients`, `structure`, `state`, `batches`: the rows; `rows`: all of them.
- `cases`: a construct in a network drawn from a seed, written out as a script.
- `oracle`: the values that a case must have, or that it must be refused, from the model's own `backward()`.
- `subject`: fxcurv's answers for the same calls. `judge`: the two compared.
- `processes`: oracle and subject, each call in a process of its own.
- `run`: many cases, and the table of their outcomes, for `tools/stress.py --kind hostile`.

Only `subject` imports fxcurv.
"""
