"""A bundle of a checkpoint by the exporter of any checkout: each version reads what it wrote itself."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["export_by"]


def export_by(checkout: Path, model: Path, bundle: Path, recipe: str = "int4", more: Sequence[str] = ()) -> Path:
    """Export `model` to `bundle` with the code in `checkout`, uncompared, and with `more` options; raises SystemExit
    with its words."""
    options = ["--recipe", recipe, "--verify", "off", *more]
    command = [sys.executable, "-m", "mllm_edge", "export", str(model), str(bundle), *options]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    # The current folder comes first where modules are looked for.
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{checkout}: the export failed\n{done.stderr}")
    return bundle
