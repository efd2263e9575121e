"""Every name of TensorRT and CUDA that the backend uses exists in the bindings that are installed.

The names are read from the sources: what a function of the backend takes from `trt`, from an object that TensorRT made,
or from CUDA by its name. The stand-in, which the other tests run on, has to have them in the bindings too.
"""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings

trt: Any = tensorrt_rtx_bindings

FOLDER = Path(__file__).parents[2] / "mllm_edge" / "runtime" / "backends"
FILES = sorted(FOLDER.glob("tensorrt*.py"))
# What the backend calls an object of TensorRT → the class it is of.
OBJECTS = {
    "builder": trt.Builder,
    "runtime_cache": trt.IRuntimeCache,
    "config": trt.IBuilderConfig,
    "engine": trt.ICudaEngine,
    "_context": trt.IExecutionContext,
    "layer": trt.ILayer,
    "network": trt.INetworkDefinition,
    "parser": trt.OnnxParser,
    "profile": trt.IOptimizationProfile,
    "runtime": trt.Runtime,
    "runtime_config": trt.IRuntimeConfig,
    "tensor": trt.ITensor,
    "top": trt.ITopKLayer,
    "total": trt.IReduceLayer,
    "attention": trt.IAttention,
}
# Names that the backend's own objects have, which are called alike.
OWN = {
    "engine": {
        "top_logits",
        "contexts",
        "data",
        "problem",
        "version",
        "module",
        "log",
        "warnings",
        "trt",
        "engine",
        "check",
        "profiles",
        "said",
        "inputs",
        "open",
    },
    "tensor": {"name", "dtype", "shape"},
    "layer": {"__class__", "attention"},
    "runtime": set(),
}
# Read only where there is no CausalMaskKind.
OLD = {("attention", "causal")}


def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]


def _attributes() -> set[tuple[str, str]]:
    """Each `a.b` and `x.a.b` as (a, b)."""
    found = set()
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
                if name is not None:
                    found.add((name, node.attr))
    return found


def _paths_of_trt() -> set[str]:
    """Dotted names below `trt`, as TensorIOMode.INPUT."""
    found = set()
    for tree in _trees():
        for node in ast.walk(tree):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
                if parts and isinstance(node, ast.Attribute) and node.attr == "trt":
                    break
            if parts and (getattr(node, "id", None) == "trt" or getattr(node, "attr", None) == "trt"):
                found.add(".".join(reversed(parts)))
    return found


def test_names_of_the_module() -> None:
    paths = _paths_of_trt()
    assert {"Builder", "Runtime", "OnnxParser", "TensorIOMode.INPUT", "MemoryPoolType.WORKSPACE"} <= paths
    for path in paths:
        value = trt
        for part in path.split("."):
            assert hasattr(value, part), path
            value = getattr(value, part)


def test_names_of_objects() -> None:
    used = {(a, b) for a, b in _attributes() if a in OBJECTS}
    assert {a for a, _ in used} == set(OBJECTS)
    for name, attribute in used - OLD:
        assert attribute in OWN.get(name, set()) or hasattr(OBJECTS[name], attribute), f"{name}.{attribute}"
    for name in ("execute_async_v3", "set_tensor_address", "set_input_shape", "set_device_memory", "profiler"):
        assert ("_context", name) in used


def test_the_stand_in_invents_nothing() -> None:
    source = (Path(__file__).parent / "tensorrt_stand_in.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}
    pairs = {
        "Builder": trt.Builder,
        "Runtime": trt.Runtime,
        "_Added": trt.ILayer,
        "_Config": trt.IBuilderConfig,
        "_Context": trt.IExecutionContext,
        "_Engine": trt.ICudaEngine,
        "_Monitor": trt.IProgressMonitor,
        "_Network": trt.INetworkDefinition,
        "_Parser": trt.OnnxParser,
        "_Profile": trt.IOptimizationProfile,
        "_Profiler": trt.IProfiler,
        "_RuntimeCache": trt.IRuntimeCache,
        "_RuntimeConfig": trt.IRuntimeConfig,
    }
    for name, real in pairs.items():
        methods = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef)}
        for method in {m for m in methods if not m.startswith("_")} - {"load"}:
            assert hasattr(real, method), f"{name}.{method}"


def test_names_of_cuda() -> None:
    """What the backend calls is what the stand-in has; and the real bindings, where they are installed."""
    text = (FOLDER / "cuda.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {name for name in strings | attributes if name.startswith("cuda") and name.isalnum() and name != "cuda"}
    assert {"cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaGraphLaunch", "cudaMemGetInfo"} <= used
    source = (Path(__file__).parent / "cuda_stand_in.py").read_text(encoding="utf-8")
    assert all(name in source for name in used)
    if importlib.util.find_spec("cuda") is not None:
        runtime = importlib.import_module("cuda.bindings.runtime")
        kinds = (runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode, runtime.cudaDeviceAttr)
        kinds += (runtime.cudaError_t,)
        assert all(any(hasattr(kind, name) for kind in kinds) for name in used)
