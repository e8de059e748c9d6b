"""Views of graphs and results for people: tables, flow charts, plots.

Imports go to `fxcurv.runtime` and the rooms below it.
"""
