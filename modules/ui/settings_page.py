"""The settings page: defaults for new chats, the page's own behaviour, and what this is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    from modules.ui.access import Access

ABOUT = """
### About Switchyard
One page and one API for every local backend, each model in a process of its own. Your chats stay in this folder on this machine.

The page is built with Gradio, marked, DOMPurify, KaTeX and highlight.js, all served from here; nothing comes from the internet.
An OpenAI-compatible API answers at `/v1` of this address.
"""
JS_ONLY: dict[str, Any] = {"fn": None, "queue": False, "show_progress": "hidden", "api_visibility": "private"}


def _save(name: str) -> str:
    return f"(value) => {{ window.switchyard.saveSetting('{name}', value); }}"


class SettingsPage:
    """`outputs` are the components that `fill` gives values to."""

    def __init__(self, access: Access) -> None:
        self._access = access
        gr.Markdown("## Settings")
        system = gr.Textbox(
            label="System prompt of new chats",
            info="Tells the model how to behave. Each chat can have its own.",
            lines=4,
            interactive=True,
            elem_id="sy-system-prompt",
        )
        theme = gr.Radio(
            choices=[("As the system", "system"), ("Light", "light"), ("Dark", "dark")],
            value="system",
            label="Theme",
            interactive=True,
            elem_id="sy-theme",
        )
        send_with = gr.Radio(
            choices=[("Enter", "enter"), ("Ctrl + Enter", "ctrl_enter")],
            value="enter",
            label="Send a message with",
            interactive=True,
            elem_id="sy-send-with",
        )
        receipts = gr.Checkbox(
            label="Show tokens and speed below each answer", value=True, interactive=True, elem_id="sy-receipts"
        )
        autoload = gr.Checkbox(label="Load the last used model at the start", value=True, interactive=True, elem_id="sy-autoload")
        gr.Markdown(ABOUT)
        self._names = ["system_prompt", "theme", "send_with", "show_receipts", "autoload_last_model"]
        self.outputs = [system, theme, send_with, receipts, autoload]
        system.blur(inputs=[system], outputs=None, js=_save("system_prompt"), **JS_ONLY)
        theme.input(inputs=[theme], outputs=None, js="(choice) => { window.switchyard.theme(choice); }", **JS_ONLY)
        send_with.input(inputs=[send_with], outputs=None, js=_save("send_with"), **JS_ONLY)
        receipts.input(inputs=[receipts], outputs=None, js=_save("show_receipts"), **JS_ONLY)
        autoload.input(inputs=[autoload], outputs=None, js=_save("autoload_last_model"), **JS_ONLY)

    def fill(self) -> list[Any]:
        """The state of every component of `outputs`."""
        settings = self._access.settings()
        return [gr.update(value=settings[name]) for name in self._names]
