"""`python -m mllm_edge` is the command `mllm-edge`."""

from mllm_edge.cli import main

if __name__ == "__main__":
    main(prog_name="mllm-edge")
