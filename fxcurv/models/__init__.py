"""Models by name, example inputs for them, and data that packages ship. Nothing is downloaded.

A new source of images is a function in `data`, a new library of models one in `targets`. Imports go to
`fxcurv.runtime` and the rooms below it.
"""
