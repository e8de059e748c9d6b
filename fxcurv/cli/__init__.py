"""The command line: `main` is the entry point, `check` the checks, `config` their settings, `demo` the demonstration.

A new command is a function in `main` and a line of its parser. May import from every package.
"""
