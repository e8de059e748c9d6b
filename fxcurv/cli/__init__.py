"""The command line: `main` is the entry point, `check` its checks, `config` their settings, `demo` the demonstration.

A new command is a function in `main` and a line of its parser. Imports go everywhere.
"""
