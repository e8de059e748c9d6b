"""Signatures: all that a model may read when it is called, as a key of a process and as a digest for files.

`code` describes functions and classes, `contents` the parts of a container or object, `reachable` walks from modules to
all of them, and `stable` turns the walk into digests that are equal in another process. A new kind of object is a case
of `contents.parts_of`. Imports go to `fxcurv.core`.
"""
