"""Models by name, their example inputs, and data of installed packages. Nothing is downloaded.

A new source of images is a function in `data`, a new model library a function in `targets`. May import from
`fxcurv.runtime` and packages below it.
"""
