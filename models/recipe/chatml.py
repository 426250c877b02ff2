"""The chat format: special tokens and template of ChatML."""

from __future__ import annotations

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = (END_OF_TEXT, START, END, PAD)  # in the order of their ids, from 0

# An optional system message, then the turns; no default system prompt and no text outside the turns.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def render(document: str | list[dict[str, str]]) -> str:
    """The text that a document is trained as: what ``CHAT_TEMPLATE`` gives, or plain text with its end mark."""
    if isinstance(document, str):
        return document + END_OF_TEXT
    return "".join(f"{START}{turn['role']}\n{turn['content']}{END}\n" for turn in document)
