"""Trials: properties of an op that are found by running it on random inputs.

`samples` finds the axis of the samples, or that they mix; `custom_gradients` whether a user's own backward is linear,
keeps samples apart, and can be differentiated. Imports go to `fxcurv.ir` and the rooms below it.
"""
