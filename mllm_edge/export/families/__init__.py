"""One module per family, which defines a `FAMILY`: see `mllm_edge.export.family`."""
