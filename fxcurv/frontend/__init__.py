"""The front end: inputs and outputs of a model, its capture by torch.export, isolation of the process, cached programs.

`capture` is the only file that knows torch.export. Imports go to `fxcurv.quantities` and the rooms below it; the room
does not see `fxcurv.losses`.
"""
