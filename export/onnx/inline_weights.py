"""Move a model's external data into the ONNX file itself, a piece at a time.

protobuf's own writer holds every weight three times. Fields of a message may come in any order, so the small rest of
the graph is serialised as usual, and each tensor follows it as one more `initializer`.
Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx

from adaattn.system.atomic_file import replacing

PIECE = 1 << 24
MODEL_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
GRAPH_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
TENSOR_RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


def inline_weights(path: Path, data: Path) -> None:
    """Rewrite the ONNX file with the weights of `data`, its external file, inside, and delete that.

    Args:
        path: the ONNX file; its weights and the rest must stay under protobuf's 2 GiB together.
        data: the one file that its external tensors are in.
    """
    model = onnx.load(path, load_external_data=False)
    tensors = []
    for tensor in [x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]:
        place = {entry.key: entry.value for entry in tensor.external_data}
        header = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        length = int(place["length"])
        start = header.SerializeToString() + _head(TENSOR_RAW_DATA, length)
        tensors.append((start, int(place.get("offset", 0)), length))
        model.graph.initializer.remove(tensor)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = [_head(GRAPH_INITIALIZER, len(start) + length) for start, _, length in tensors]
    size = len(graph) + sum(len(head) + len(start) + n for head, (start, _, n) in zip(heads, tensors, strict=True))

    with replacing(path) as out, data.open("rb") as weights:
        out.write(model.SerializeToString() + _head(MODEL_GRAPH, size) + graph)
        for head, (start, offset, length) in zip(heads, tensors, strict=True):
            out.write(head + start)
            _copy(weights, out, offset, length)
    data.unlink()


def _head(field: int, length: int) -> bytes:
    """Return tag and length of a length-delimited field."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _copy(source: BinaryIO, target: BinaryIO, offset: int, length: int) -> None:
    source.seek(offset)
    while length:
        piece = source.read(min(length, PIECE))
        if not piece:
            raise OSError("the external data ends early")
        target.write(piece)
        length -= len(piece)
