#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# onnxruntime 1.32.0: a quantized product and the sum behind it, of static shape, become a Gemm with a reshape before it; the Q/DQ pair that
# is copied behind that reshape has output_dtype int8 and a zero point of uint8, so that the session does not open.
"$T/v/bin/pip" -q install onnxruntime==1.32.0 onnx numpy
cd "$T" && "$T/v/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

constants = {
    "scale": np.array(0.1, np.float32),
    "zero": np.array(0, np.int8),
    "codes": np.ones((8, 6), np.int8),
    "bias": np.zeros(6, np.float32),
}
nodes = [
    helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
    helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"]),
    helper.make_node("MatMul", ["d", "w"], ["m"]),
    helper.make_node("Add", ["m", "bias"], ["y"]),
]
tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, s]) for n, s in (("x", 8), ("y", 6))]
weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
content = model.SerializeToString()
onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"])
try:
    onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
except Exception as e:
    print(f"a session of a valid graph does not open: {str(e)[:160]}")
    assert "output_dtype" in str(e)
else:
    raise AssertionError("the session opens")
PY
