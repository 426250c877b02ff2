"""langchain-openai against this server, by langchain's own standard suite for chat models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from langchain_core.language_models import BaseChatModel

    from tests.api.conftest import Server

OWN_WILL = "Echo has no will of its own: this test leaves to the model what it says."
# langchain's own, about its own classes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1:UserWarning"),
]


class TestChatOpenAI(ChatModelIntegrationTests):
    """Echo answers, held to forms and forced calls as any model is."""

    @pytest.fixture(autouse=True)
    async def _serve(self, server: Server) -> AsyncIterator[None]:
        """langchain keeps its own clients open for ever; these are closed in the loop they were used in."""
        self._url = f"{server.url}/v1"
        with openai.DefaultHttpxClient() as self._http:
            async with openai.DefaultAsyncHttpxClient() as self._async_http:
                yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        clients = {"http_client": self._http, "http_async_client": self._async_http}
        return {"model": "echo", "base_url": self._url, "api_key": "none", "max_retries": 0, "stream_usage": True, **clients}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @pytest.mark.xfail(reason=OWN_WILL, strict=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason=OWN_WILL, strict=True)
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)

    @pytest.mark.xfail(reason=OWN_WILL, strict=True)
    def test_unicode_tool_call_integration(self, model: BaseChatModel) -> None:  # type: ignore[override]
        super().test_unicode_tool_call_integration(model, tool_choice="any", force_tool_call=True)

    @pytest.mark.xfail(reason="Speed is measured in benchmarks/.", strict=True)
    def test_stream_time(self) -> None:  # type: ignore[override]
        raise NotImplementedError
