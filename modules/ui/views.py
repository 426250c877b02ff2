"""Our own views inside Gradio: each is a constant template that an ES module of static/js takes over.

The templates hold no values: Gradio evaluates them as JavaScript template literals, so anything interpolated there could run.
They are plain gr.HTML components and no subclasses, for which Gradio would write a .pyi file into this folder at import.
"""

from __future__ import annotations

from typing import Any

import gradio as gr


def view(css_class: str, module: str, elem_id: str, *events: str) -> Any:
    """A component that `static/js/MODULE.js` mounts. Gradio offers as events the names in quotes in its script."""
    names = ", ".join(f"'{name}'" for name in events)
    script = (
        f"import(new URL('ui-static/js/{module}.js', document.baseURI).href)"
        f".then((module) => module.mount({{element, trigger, events: [{names}]}}))"
        ".catch((error) => { console.error(error); element.textContent = 'This part did not load. Reload the page.'; });"
    )
    template = f"<div class='{css_class}' data-testid='{elem_id}'></div>"
    return gr.HTML(value=None, html_template=template, js_on_load=script, apply_default_css=False, elem_id=elem_id)


def shell_view() -> Any:
    """The top bar. Its events `models_changed` and `settings_changed` ask Python to fill the controls again."""
    return view("sy-topbar", "shell", "sy-shell", "models_changed", "settings_changed")


def chat_view() -> Any:
    """The chat. It speaks to /ui-api itself: no token goes through Gradio."""
    return view("sy-chat", "chatview", "sy-chat-view")


def models_view() -> Any:
    """What is loaded and what can be loaded."""
    return view("sy-models", "modelspage", "sy-models-view")


def remotes_view() -> Any:
    """Other servers as backends, over /ui-api/remotes."""
    return view("sy-remotes", "remotes", "sy-remotes-view")


def backends_view() -> Any:
    """Which backends are there, and what the others lack."""
    return view("sy-backends", "backends", "sy-backends-view")
