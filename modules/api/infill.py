"""Fill in the middle: the prompt of a model that was trained for it, found by the marks its tokenizer knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modules.errors import UnsupportedParameter

if TYPE_CHECKING:
    from modules.engine_client import EngineClient

# (mark, which part, mark, which part, mark), by family
_FORMS = (
    ("<|fim_prefix|>", "prefix", "<|fim_suffix|>", "suffix", "<|fim_middle|>"),  # Qwen Coder, CodeGemma
    ("<fim_prefix>", "prefix", "<fim_suffix>", "suffix", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "prefix", "<fim-suffix>", "suffix", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "prefix", "<｜fim▁hole｜>", "suffix", "<｜fim▁end｜>"),  # DeepSeek Coder
    ("▁<PRE>", "prefix", "▁<SUF>", "suffix", "▁<MID>"),  # Code Llama
    ("[SUFFIX]", "suffix", "[PREFIX]", "prefix", ""),  # Codestral
)


async def infill_prompt(client: EngineClient, prefix: str, suffix: str) -> str:
    """Raises UnsupportedParameter for a model without marks for it."""
    texts = {"prefix": prefix, "suffix": suffix}
    for before, first, between, second, after in _FORMS:
        marks = [mark for mark in (before, between, after) if mark]
        if all([await _is_one_token(client, mark) for mark in marks]):
            return f"{before}{texts[first]}{between}{texts[second]}{after}"
    raise UnsupportedParameter(
        "This model was not trained to fill in the middle.", hint="Leave suffix out, or load a model for code.", param="suffix"
    )


async def _is_one_token(client: EngineClient, mark: str) -> bool:
    """Also between letters, where only a token of its own stays whole."""
    return len(await client.encode(f"x{mark}x", False)) == len(await client.encode("x", False)) * 2 + 1
