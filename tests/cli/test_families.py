"""`mllm-edge families`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mllm_edge.errors import UnsupportedModelError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import families, family_for
from mllm_edge.export.targets import TARGETS
from tests.families.row import rows

Cli = Callable[..., Result]


def test_every_registered_family_is_listed(cli: Cli) -> None:
    listed = json.loads(cli("families", "--json").stdout)
    supported = {system["model_type"]: system for system in listed if system["status"] == "supported"}
    assert {kind: system["family"] for kind, system in supported.items()} == {
        model_type: family.name for model_type, family in families().items()
    }
    text = cli("families").stdout
    for system in supported.values():
        assert system["decoders"]
        assert system["examples"]
        assert system["checkpoint"].count("/") == 1
        assert system["int4_bytes"] > 5e7
        assert set(system["targets"]) == set(rows()[system["family"]].reached)
        for word in (system["model_type"], system["name"], *system["decoders"], *system["examples"]):
            assert word in text
    assert ", ".join(TARGETS) in text


def test_what_is_not_exported_is_listed_with_the_reason(cli: Cli) -> None:
    listed = json.loads(cli("families", "--json").stdout)
    text = cli("families").stdout
    others = [system for system in listed if system["status"] != "supported"]
    assert {"GPT-4V and GPT-4o", "Gemini", "NExT-GPT", "Visual ChatGPT", "VideoChat-Text"} == {
        system["name"] for system in others if system["status"] == "impossible"
    }
    assert {"deepseek_vl_v2", "openflamingo", "phi3_v", "cogvlm2"} <= {system["model_type"] for system in others}
    for system in others:
        assert system["why"]
        assert system["name"] in text
    assert len({system["name"] for system in listed}) == len(listed)


def test_what_is_known_is_told_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3_v"}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"'phi3_v' is not supported \(Phi-3-Vision: its code is not in"):
        family_for(open_source(str(tmp_path)))


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
    monkeypatch.setitem(sys.modules, "mllm_edge.export.systems", None)
    result = cli("families")
    assert result.exit_code == 1
    assert "pip install" in result.stderr
    assert "[export]" in result.stderr
