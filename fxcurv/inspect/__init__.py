"""Views of graphs and results: tables, flow charts, plots.

May import from `fxcurv.runtime` and packages below it.
"""
