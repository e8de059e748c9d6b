"""The benchmark's parts: problems, rows, their measurement, scaling, the machine, the report, the picture."""
