"""Numbers for symbolic dimensions in a serialized ONNX graph, without the onnx package, which a device lacks.

Protocol buffers are nested records of numbered fields; only the records on the way to a dimension are rewritten, all
other bytes are copied.
"""

from collections.abc import Iterator, Mapping

from mllm_edge.errors import BackendError

__all__ = ["fix_dimensions"]

# ModelProto.graph → GraphProto.input, .output, .value_info → ValueInfoProto.type → TypeProto.tensor_type
# → TypeProto.Tensor.shape → TensorShapeProto.dim
_PATH = ((7,), (11, 12, 13), (2,), (1,), (2,), (1,))
_DIM_VALUE, _DIM_PARAM = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
    for number, kind, whole, content in _fields(message):
        if kind == _BYTES and number in path[0]:
            inner = _rewrite(message[content], path[1:], sizes)
            parts.append(_varint(number << 3 | _BYTES) + _varint(len(inner)) + inner)
        else:
            parts.append(message[whole])
    return b"".join(parts)


def _dimension(message: bytes, sizes: Mapping[str, int]) -> bytes:
    """A dimension whose symbol has a size: the size, and what else it says."""
    kept, size = [], None
    for number, kind, whole, content in _fields(message):
        if number == _DIM_PARAM and kind == _BYTES:
            size = sizes.get(message[content].decode("utf-8"))
            if size is not None:
                continue
        kept.append(message[whole])
    value = [] if size is None else [_varint(_DIM_VALUE << 3 | _VARINT) + _varint(size)]
    return b"".join(value + kept)


def _fields(message: bytes) -> Iterator[tuple[int, int, slice, slice]]:
    """Number, wire type, the whole field and its content, one field after the other."""
    position = 0
    while position < len(message):
        begin = position
        key, position = _read_varint(message, position)
        kind, content = key & 7, position
        if kind == _VARINT:
            _, position = _read_varint(message, position)
        elif kind == _BYTES:
            length, content = _read_varint(message, position)
            position = content + length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {begin}")
        if position > len(message):
            raise ValueError(f"a field at byte {begin} ends behind its record")
        yield key >> 3, kind, slice(begin, position), slice(content, position)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
