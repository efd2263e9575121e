"""Numbers for symbolic dimensions in a serialized ONNX graph, without the onnx package, which a device lacks.

Only the records on the way to a dimension are rewritten, all other bytes are copied.
"""

from collections.abc import Mapping

from mllm_edge.errors import BackendError
from mllm_edge.runtime.onnx_file.protobuf import BYTES, VARINT, fields, varint

__all__ = ["fix_dimensions"]

# ModelProto.graph → GraphProto.input, .output, .value_info → ValueInfoProto.type → TypeProto.tensor_type
# → TypeProto.Tensor.shape → TensorShapeProto.dim
_PATH = ((7,), (11, 12, 13), (2,), (1,), (2,), (1,))
_DIM_VALUE, _DIM_PARAM = 1, 2


def fix_dimensions(model: bytes, sizes: Mapping[str, int]) -> bytes:
    """The graph with the symbols of `sizes` replaced by numbers; raises BackendError when it is not ONNX."""
    try:
        return _rewrite(model, _PATH, sizes)
    except (IndexError, ValueError) as e:
        raise BackendError(f"the graph is damaged ({e})", "check the bundle with `mllm-edge inspect --verify`") from e


def _rewrite(message: bytes, path: tuple[tuple[int, ...], ...], sizes: Mapping[str, int]) -> bytes:
    if not path:
        return _dimension(message, sizes)
    parts = []
    for number, kind, whole, content in fields(message):
        if kind == BYTES and number in path[0]:
            inner = _rewrite(message[content], path[1:], sizes)
            parts.append(varint(number << 3 | BYTES) + varint(len(inner)) + inner)
        else:
            parts.append(message[whole])
    return b"".join(parts)


def _dimension(message: bytes, sizes: Mapping[str, int]) -> bytes:
    """A dimension whose symbol has a size: the size, and what else it says."""
    kept, size = [], None
    for number, kind, whole, content in fields(message):
        if number == _DIM_PARAM and kind == BYTES:
            size = sizes.get(message[content].decode("utf-8"))
            if size is not None:
                continue
        kept.append(message[whole])
    value = [] if size is None else [varint(_DIM_VALUE << 3 | VARINT) + varint(size)]
    return b"".join(value + kept)
