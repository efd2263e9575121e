"""A benchmark's own function as a process of any checkout: it answers a line on standard input with a line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Served"]

_ROOT = Path(__file__).parents[1]


class Served:
    """`serve(*arguments)` of the benchmark in `file`, with the package as it is in the checkout `root`. What the file
    imports of other benchmarks must stand below `if __name__ == "__main__"`: an older checkout has other ones."""

    def __init__(self, root: Path, file: str, *arguments: Any):
        given = ", ".join(repr(str(a) if isinstance(a, Path) else a) for a in arguments)
        code = (
            f"import sys; sys.path.insert(0, {str(root)!r}); import mllm_edge; import importlib.util as u; "
            f"s = u.spec_from_file_location('served', {file!r}); m = u.module_from_spec(s); s.loader.exec_module(m); "
            f"m.serve({given})"
        )
        environment = {**os.environ, "PYTHONPATH": str(root)}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root, env=environment)

    def ask(self, request: Any) -> dict[str, float]:
        """Its answer; raises SystemExit when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(request, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process of the measurement ended")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
