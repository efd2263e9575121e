"""`mllm-edge families`."""

import json
import subprocess
import sys
from collections.abc import Callable

from click.testing import Result

from mllm_edge.export.family import families
from mllm_edge.export.targets import TARGETS

Cli = Callable[..., Result]


def test_every_registered_family_is_listed(cli: Cli) -> None:
    data = json.loads(cli("families", "--json").stdout)
    assert data["targets"] == list(TARGETS)
    listed = {t: f["family"] for f in data["families"] for t in f["model_types"]}
    assert listed == {model_type: family.name for model_type, family in families().items()}
    text = cli("families").stdout
    for family in data["families"]:
        assert family["decoders"]
        assert family["examples"]
        for word in (*family["model_types"], *family["decoders"], *family["examples"]):
            assert word in text
    assert ", ".join(TARGETS) in text


def test_listing_imports_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*[n for n in ('torch', 'transformers', 'onnxruntime') if n in sys.modules]"
        ", file=sys.stderr))\n"
        "from mllm_edge.cli import main; main(['families'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True, check=True)
    assert "llava" in done.stdout
    assert done.stderr.strip() == ""


def test_without_the_exporter(cli: Cli, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mllm_edge.export.family", None)
    result = cli("families")
    assert result.exit_code == 1
    assert "pip install" in result.stderr
    assert "[export]" in result.stderr
