"""One request for each endpoint that takes a body: shown and run by /docs, printed in docs/api.md, sent by a test.

They name the model `echo`, which is always there; any other id of /v1/models may stand in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

_SAY = [{"role": "user", "content": "Hello"}]
_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
_TOOL = {"name": "weather", "description": "The weather of a city"}

# path -> (what it shows, body)
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": (
        "A chat with samplers of this server beside OpenAI's fields.",
        {"model": "echo", "messages": _SAY, "max_tokens": 50, "temperature": 0.7, "top_k": 40, "seed": 1},
    ),
    "/v1/completions": ("The continuation of a text.", {"model": "echo", "prompt": "Once upon a time", "max_tokens": 20}),
    "/v1/responses": ("OpenAI's newer form.", {"model": "echo", "input": "Hello", "max_output_tokens": 50}),
    "/v1/messages": (
        "Anthropic's form, with a tool.",
        {"model": "echo", "max_tokens": 50, "messages": _SAY, "tools": [{**_TOOL, "input_schema": _SCHEMA}]},
    ),
    "/v1/messages/count_tokens": ("How long a prompt is.", {"model": "echo", "messages": _SAY}),
    "/api/chat": (
        "Ollama's form, answered in one piece.",
        {"model": "echo", "messages": _SAY, "stream": False, "options": {"num_predict": 50, "temperature": 0.7}},
    ),
    "/api/generate": (
        "One prompt, held to a JSON schema.",
        {"model": "echo", "prompt": "Where?", "stream": False, "format": _SCHEMA, "options": {"num_predict": 200}},
    ),
    "/api/show": ("What is known about a model.", {"model": "echo"}),
    "/api/pull": ("Says success for a model that is here.", {"model": "echo"}),
    "/api/v1/generate": (
        "KoboldAI's form: raw text and its names of the samplers.",
        {"prompt": "Once upon a time", "max_length": 20, "temperature": 0.7, "rep_pen": 1.0, "sampler_seed": 1},
    ),
    "/api/extra/generate/stream": ("The same as events.", {"prompt": "Once upon a time", "max_length": 20, "genkey": "KCPP1234"}),
    "/api/extra/generate/check": ("The text so far.", {"genkey": "KCPP1234"}),
    "/api/extra/abort": ("Stop it.", {"genkey": "KCPP1234"}),
    "/api/extra/tokencount": ("Tokens of a text.", {"prompt": "Hello there"}),
    "/api/extra/detokenize": ("Text of tokens.", {"ids": [72, 105]}),
    "/completion": (
        "llama-server's own form.",
        {"prompt": "Once upon a time", "n_predict": 20, "temperature": 0.7, "samplers": ["top_k", "temperature"], "seed": 1},
    ),
    "/tokenize": ("Tokens of a text, with their pieces.", {"content": "Hello there", "with_pieces": True}),
    "/detokenize": ("Text of tokens.", {"tokens": [72, 105]}),
    "/apply-template": ("The prompt of a chat.", {"messages": _SAY}),
    "/v1/internal/encode": ("Tokens of a text.", {"text": "Hello there"}),
    "/v1/internal/decode": ("Text of tokens.", {"tokens": [72, 105]}),
    "/v1/internal/token-count": ("How many there are.", {"text": "Hello there"}),
    "/v1/internal/chat-prompt": ("The prompt of a chat.", {"messages": _SAY}),
    "/v1/internal/stop-generation": ("Stop one request, by its answer's id.", {"id": "chatcmpl-0123456789abcdef01234567"}),
    "/v1/internal/model/load": ("Load a model with options of its loader.", {"model_name": "echo", "args": {"n_ctx": 4096}}),
}
# Those that need a loader with more than echo has; the test sends them to the bundled model.
NEEDS_A_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/embeddings": ("Vectors of texts.", {"input": ["a cat", "a dog"]}),
    "/api/embed": ("Vectors of texts.", {"model": "wren-6m", "input": ["a cat", "a dog"]}),
    "/api/embeddings": ("A vector, the older form.", {"model": "wren-6m", "prompt": "a cat"}),
    "/embedding": ("Vectors of texts.", {"content": ["a cat", "a dog"]}),
    "/infill": ("What belongs in between, by a model for code.", {"input_prefix": "def f(", "input_suffix": "): pass"}),
    "/v1/internal/logits": ("The likeliest next tokens.", {"prompt": "Once upon a", "top_logits": 5}),
    "/v1/internal/model/download": ("Fetch a model in the background.", {"repository": "owner/name", "files": ["model.gguf"]}),
    "/v1/internal/lora/load": ("Apply adapters of --lora-dir.", {"lora_names": ["my-lora"]}),
}


def install(app: FastAPI) -> None:
    """Put the examples into the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path, (_, body) in (EXAMPLES | NEEDS_A_MODEL).items():
            content = document["paths"].get(path, {}).get("post", {}).get("requestBody", {}).get("content", {})
            if "application/json" in content:
                content["application/json"]["example"] = body
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document
