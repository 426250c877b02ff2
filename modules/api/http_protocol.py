"""uvicorn's HTTP protocol with what it lacks: a deadline for receiving a request's head, and JSON for unparsable requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

HEAD_DEADLINE_S = 15.0
DISCARD_S = 5.0


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose request head is not complete HEAD_DEADLINE_S after it began, however it trickles in.

    A request that was answered before its body was read (413, 401) has DISCARD_S to send the rest, which is thrown away: closing
    at once would reset the connection, and the client would never see the answer.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self.conn.trailing_data[0]:
                self._arm()
        elif not self._discarding:
            self._disarm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._discarding and not self.transport.is_closing():
            self._arm(DISCARD_S)
        # A next request that came in halfway during this one has begun its head.
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._arm()

    def send_400_response(self, msg: str) -> None:
        body = {"error": {"message": msg, "type": "invalid_request_error", "param": None, "code": "invalid_http"}}
        content = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
            (b"x-content-type-options", b"nosniff"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _discarding(self) -> bool:
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and self.conn.their_state is h11.SEND_BODY

    def _arm(self, seconds: float = HEAD_DEADLINE_S) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(seconds, self._too_late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
