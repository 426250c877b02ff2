"""The parameter panel: every control comes from the one table in modules/sampling.py.

Controls write through to the server's settings from the browser (static/js/settings.js); the server checks the values, tells
every open page, and `fill` reads them back. A parameter that the active backend lacks is greyed, with the reason below it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.sampling import PARAMETERS, Parameter

if TYPE_CHECKING:
    from modules.ui.access import Access

LABELS = {"top_p": "Top P", "top_k": "Top K", "min_p": "Min P", "tfs": "TFS", "top_a": "Top A", "typical_p": "Typical P"}


def label(name: str) -> str:
    """repetition_penalty -> "Repetition penalty"; the field's own spelling where it has one."""
    text = LABELS.get(name, name.replace("_", " ").capitalize())
    return text.replace("Dry ", "DRY ").replace("Xtc ", "XTC ").replace(" eos ", " EOS ")


def show(parameter: Parameter, value: Any) -> Any:
    """A stored value as its control holds it: lists and maps are edited as JSON."""
    if parameter.kind == "names":
        return list(value)
    if parameter.kind in ("strings", "bias"):
        return json.dumps(list(value) if parameter.kind == "strings" else dict(value), ensure_ascii=False)
    return value


def control(parameter: Parameter) -> Any:
    """The Gradio component of one parameter."""
    common: dict[str, Any] = {
        "label": label(parameter.name),
        "info": parameter.help,
        "elem_id": f"sy-p-{parameter.name}",
        "interactive": True,
        "value": show(parameter, parameter.default),
    }
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.kind == "names":
        return gr.Dropdown(choices=list(parameter.choices), multiselect=True, **common)
    if parameter.kind in ("text", "strings", "bias"):
        return gr.Textbox(lines=1, max_lines=4, **common)
    if parameter.ui is None:
        return gr.Number(precision=0 if parameter.kind == "int" else None, **common)
    low, high, step = parameter.ui
    return gr.Slider(minimum=low, maximum=high, step=step, **common)


def _in_browser(event: Any, component: Any, call: str) -> None:
    """On `event`, run `window.switchyard.CALL` with the component's `value`; nothing goes through Gradio's server."""
    js = f"(value) => {{ window.switchyard.{call}; }}"
    event(fn=None, inputs=[component], outputs=None, js=js, queue=False, show_progress="hidden", api_visibility="private")


class ParameterPanel:
    """The panel at the right of every page; `outputs` are the components that `fill` gives values to."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._controls: dict[str, Any] = {}
        with gr.Column(elem_id="sy-params"):
            gr.Markdown("### Parameters", elem_id="sy-params-title")
            self._preset = gr.Dropdown(choices=[], value=None, label="Preset", elem_id="sy-preset", interactive=True)
            with gr.Row(elem_id="sy-preset-buttons"):
                self._save = gr.Button("Save as…", size="sm", elem_id="sy-preset-save")
                self._delete = gr.Button("Delete", size="sm", elem_id="sy-preset-delete")
                self._neutral = gr.Button("Neutral", size="sm", elem_id="sy-preset-neutral")
            self._max_tokens = gr.Number(
                label="Max tokens",
                info="The longest answer, in tokens; 0 goes on to the end of the context.",
                precision=0,
                minimum=0,
                value=0,
                interactive=True,
                elem_id="sy-p-max_tokens",
            )
            self._stop = gr.Textbox(
                label="Stop sequences",
                info="One per line; \\n stands for a line break.",
                lines=1,
                max_lines=5,
                interactive=True,
                elem_id="sy-p-stop",
            )
            groups: dict[str, list[Parameter]] = {}
            for parameter in PARAMETERS.values():
                groups.setdefault(parameter.group, []).append(parameter)
            for group, parameters in groups.items():
                with gr.Accordion(group, open=group == "Basics", elem_id=f"sy-group-{group.lower()}"):
                    for parameter in parameters:
                        self._controls[parameter.name] = control(parameter)
        self.outputs = [self._preset, self._max_tokens, self._stop, *self._controls.values()]

    def wire(self) -> None:
        """Connect the controls to the browser's write-through."""
        for name, component in self._controls.items():
            kind = PARAMETERS[name].kind
            event = component.blur if kind in ("text", "strings", "bias") else component.input
            _in_browser(event, component, f"saveParameter('{name}', '{kind}', value)")
        _in_browser(self._max_tokens.input, self._max_tokens, "saveSetting('max_tokens', value > 0 ? value : null)")
        _in_browser(self._stop.blur, self._stop, "saveStop(value)")
        _in_browser(self._preset.input, self._preset, "loadPreset(value)")
        _in_browser(self._save.click, self._preset, "savePreset(value)")
        _in_browser(self._delete.click, self._preset, "deletePreset(value)")
        _in_browser(self._neutral.click, self._preset, "neutral()")

    def fill(self) -> list[Any]:
        """The state of every component of `outputs`."""
        settings = self._access.settings()
        support = self._access.parameter_support()
        sampling = settings.get("sampling") or {}
        stop = "\n".join(text.replace("\n", "\\n") for text in settings.get("stop") or ())
        updates = [
            gr.update(choices=self._access.presets(), value=settings.get("preset") or None),
            gr.update(value=settings.get("max_tokens") or 0),
            gr.update(value=stop),
        ]
        for name in self._controls:
            parameter = PARAMETERS[name]
            supported, reason = support.get(name, (True, ""))
            updates.append(
                gr.update(
                    value=show(parameter, sampling.get(name, parameter.default)),
                    info=parameter.help if supported else reason,
                    interactive=supported,
                    elem_classes=[] if supported else ["sy-unsupported"],
                )
            )
        return updates
