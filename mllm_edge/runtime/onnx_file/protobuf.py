"""Protocol buffers, which are nested records of numbered fields: the little that serialized ONNX graphs need."""

from collections.abc import Iterator

__all__ = ["BYTES", "VARINT", "encode_bytes", "encode_number", "fields", "read_varint", "varint"]

VARINT, BYTES = 0, 2
_FIXED64, _FIXED32 = 1, 5


def fields(message: bytes) -> Iterator[tuple[int, int, slice, slice]]:
    """Number, wire type, the whole field and its content, one field after the other.

    Raises ValueError or IndexError when the record is damaged.
    """
    position = 0
    while position < len(message):
        begin = position
        key, position = read_varint(message, position)
        kind, content = key & 7, position
        if kind == VARINT:
            _, position = read_varint(message, position)
        elif kind == BYTES:
            length, content = read_varint(message, position)
            position = content + length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {begin}")
        if position > len(message):
            raise ValueError(f"a field at byte {begin} ends behind its record")
        yield key >> 3, kind, slice(begin, position), slice(content, position)


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """The unsigned number at `position`, and the position behind it; raises IndexError when it does not end."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def varint(value: int) -> bytes:
    """An unsigned number."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_number(number: int, value: int) -> bytes:
    """The field `number` with an unsigned value."""
    return varint(number << 3 | VARINT) + varint(value)


def encode_bytes(number: int, content: bytes | str) -> bytes:
    """The field `number` with text, bytes or another record."""
    data = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | BYTES) + varint(len(data)) + data
