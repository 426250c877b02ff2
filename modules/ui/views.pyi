"""Our own views inside Gradio: each is a constant template that an ES module of static/js takes over.

The templates hold no values: Gradio evaluates them as JavaScript template literals, so anything interpolated there could run.
"""

from __future__ import annotations

from typing import Any

import gradio as gr


def _mount(module: str, *events: str) -> str:
    # Gradio offers as events the names that stand in quotes in this text.
    names = ", ".join(f"'{name}'" for name in events)
    return (
        f"import(new URL('ui-static/js/{module}.js', document.baseURI).href)"
        f".then((module) => module.mount({{element, trigger, events: [{names}]}}))"
        ".catch((error) => { console.error(error); element.textContent = 'This part of the page did not load. Reload the page.'; });"
    )

from gradio.events import Dependency

class _View(gr.HTML):  # type: ignore[misc]  # gradio is not typed here
    def __init__(self, template: str, script: str, **kwargs: Any) -> None:
        super().__init__(value=None, html_template=template, css_template="", js_on_load=script, apply_default_css=False, **kwargs)

    def get_block_name(self) -> str:
        return "html"
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class ShellView(_View):
    """The top bar. Its events `models_changed` and `settings_changed` ask Python to fill the controls again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("<div class='sy-topbar'></div>", _mount("shell", "models_changed", "settings_changed"), **kwargs)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class ChatView(_View):
    """The chat. It speaks to /ui-api itself: no token goes through Gradio."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("<div class='sy-chat' data-testid='chat'></div>", _mount("chatview"), **kwargs)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class ModelsView(_View):
    """What is loaded, what can be loaded, and which backends are there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("<div class='sy-models' data-testid='models-view'></div>", _mount("modelspage"), **kwargs)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component