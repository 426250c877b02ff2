"""Text to token ids and back by each server's own routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modules.errors import RemoteError, UnsupportedParameter

if TYPE_CHECKING:
    from loaders._remote_kinds import Kind
    from modules.remotes.connection import Connection


class RemoteTokenizer:
    """The tokenizer behind one model of one server."""

    def __init__(self, connection: Connection, kind: Kind, model: str) -> None:
        self._connection, self._kind, self._model = connection, kind, model

    async def encode(self, text: str, add_special: bool) -> list[int]:
        """Raises RemoteError, UnsupportedParameter where the server has no such route."""
        post, model = self._connection.post, {"model": self._model}
        match self._kind.tokenizer:
            case "switchyard":
                answer = await post("/tokenize", {"content": text, "add_special": add_special, **model}, root=True)
            case "vllm":
                answer = await post("/tokenize", {"prompt": text, "add_special_tokens": add_special, **model}, root=True)
            case "llama-server":
                answer = await post("/tokenize", {"content": text, "add_special": add_special, **model}, root=True)
            case "llama-cpp-python":
                answer = await post("/extras/tokenize", {"input": text, **model}, root=True)
            case "tgi":
                answer = await post("/tokenize", {"inputs": text, "add_special_tokens": add_special}, root=True)
            case "tabbyapi":
                answer = await post("/token/encode", {"text": text, "add_bos_token": add_special})
            case _:
                raise self.none()
        found = answer.get("tokens") if isinstance(answer, dict) else answer
        return self._ids([item.get("id") if isinstance(item, dict) else item for item in found or ()])

    async def decode(self, token_ids: Sequence[int], skip_special: bool) -> str:
        """Raises as `encode` does."""
        post, body = self._connection.post, {"tokens": list(token_ids), "model": self._model}
        match self._kind.tokenizer:
            case "switchyard" if skip_special:
                answer = await post("/internal/decode", body)
            case "switchyard" | "vllm" | "llama-server":
                answer = await post("/detokenize", body, root=True)
            case "llama-cpp-python":
                answer = await post("/extras/detokenize", body, root=True)
            case "tabbyapi":
                answer = await post("/token/decode", {"tokens": list(token_ids), "decode_special_tokens": not skip_special})
            case _:
                raise self.none()
        for name in ("text", "content", "prompt"):
            if isinstance(answer, dict) and isinstance(answer.get(name), str):
                return str(answer[name])
        raise self._strange()

    def _ids(self, found: list[Any]) -> list[int]:
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
            raise self._strange()
        return found

    def none(self) -> UnsupportedParameter:
        """What it does not tell, as an error."""
        return UnsupportedParameter(
            f"{self._connection.server.name} does not tell the token ids of a text.", hint="Token counts are estimates with it."
        )

    def _strange(self) -> RemoteError:
        return RemoteError(f"{self._connection.server.name} answered with something that is no token list.")
