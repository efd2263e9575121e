"""`python -m mllm_edge` is the command `mllm-edge`."""

import sys

try:
    from mllm_edge.cli import main
except KeyboardInterrupt:  # there is no command yet that could say it
    sys.stderr.write("interrupted: the command was stopped\n")
    sys.exit(130)

if __name__ == "__main__":
    main(prog_name="mllm-edge")
