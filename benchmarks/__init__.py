"""Benchmarks: `python -m benchmarks.NAME`: each prints a table, exits 0 when it ran, writes JSON with `--json F`."""
