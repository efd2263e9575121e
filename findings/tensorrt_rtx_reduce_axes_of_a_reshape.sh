#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# TensorRT for RTX 1.7.1: ReduceMean takes its axes from a Constant node, but not from a Reshape of two Constants, which is as constant
# (the parser's words: it "must resolve to a build-time constant", a foldable subgraph included). torch.onnx.export without its optimizer
# writes exactly that for a mean over several axes, so a traced pooling does not parse.
"$T/v/bin/pip" -q install tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116 onnx==1.23.2 2>/dev/null
cd "$T" && "$T/v/bin/python" - <<'PY'
import numpy as np
import onnx
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper, numpy_helper

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        pass

def constant(name, values):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64)))

def parses(nodes):
    shapes = {"x": [2, 4, 4, 8], "y": [2, 8]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    graph = helper.make_graph([*nodes, mean], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    log = Log()
    network = trt.Builder(log).create_network(0)
    return trt.OnnxParser(network, log).parse(model.SerializeToString())

plain = parses([constant("axes", [1, 2])])
reshaped = parses([constant("a", [1, 2]), constant("s", [-1]), helper.make_node("Reshape", ["a", "s"], ["axes"])])
print(f"{trt.__version__}: axes of a Constant parse: {plain}; of a Reshape of Constants: {reshaped}")
assert plain and not reshaped
PY
