"""The worker pipe: 4-byte big-endian length + UTF-8 JSON object, over the child's stdin and stdout.

No I/O policy here: the frame codec, the message names and the version. Pipes, not ports: a recycled port can reach the
wrong model. JSON, not pickle: a worker is not trusted. Every frame is an object with a "type" among MESSAGES.

Parent -> worker
    hello {protocol}                              first frame, answered by ready or error
    load {path, options}                          answered by progress*, then loaded or error
    generate {request}                            answered by prefill*, token*, then done or error, all with request_id
    abort {request_id}
    call {call_id, method, arguments}             encode | decode | render | score | embed; answered by result or error with
                                                  call_id
    ping {}                                       answered by pong from the reader thread: the process is alive
    shutdown {}
Worker -> parent
    ready {protocol, loader, versions, pid, device} · progress {stage, fraction} · loaded {info}
    prefill · token · done (the events of modules.schema) · result {call_id, value} · pong
    error {error, request_id?, call_id?} · log {level, text} · status {replicas, versions} (a gateway's: modules.ray_engine)
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

from modules.errors import ProtocolError

PROTOCOL_VERSION = 3
MAX_FRAME_BYTES = 64 * 1024 * 1024
HEADER = struct.Struct(">I")
MESSAGES = frozenset(
    "hello load generate abort call ping shutdown ready progress loaded prefill token done result pong error log status".split()
)

Message = dict[str, Any]


def encode_frame(message: Message) -> bytes:
    """One frame. Lone surrogates are escaped, so any Python string crosses."""
    body = json.dumps(message, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"A frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}.")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The body's length from the 4-byte header. Raises ProtocolError when it can't be one: the pipe carries something else."""
    (length,) = HEADER.unpack(header)
    if not 2 <= length <= MAX_FRAME_BYTES:
        raise ProtocolError(f"It sent something that is no frame (length field {length}).")
    return int(length)


def decode_body(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ProtocolError(f"It sent a frame that is no JSON: {error}.") from error
    if not isinstance(message, dict) or message.get("type") not in MESSAGES:
        raise ProtocolError("It sent a frame without a known type.")
    return message


def read_frame(stream: BinaryIO) -> Message | None:
    """Read one frame from a blocking stream; None at a clean end. Raises ProtocolError on a torn or foreign frame."""
    header = _read_exactly(stream, HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise ProtocolError("The pipe ended inside a frame.")
    length = frame_length(header)
    body = _read_exactly(stream, length)
    if len(body) < length:
        raise ProtocolError("The pipe ended inside a frame.")
    return decode_body(body)


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    chunks = []
    while count:
        chunk = stream.read(count)
        if not chunk:
            break
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)
