"""The front end: a model's inputs and outputs, its capture by torch.export, process isolation, cached programs.

Only `capture` uses torch.export. Imports are restricted to `fxcurv.quantities` and the rooms below it, without
`fxcurv.losses`.
"""
