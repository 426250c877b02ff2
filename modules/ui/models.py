"""Model and backend dropdowns of the top bar, and the form of load options, generated from each loader's OptionSpec table.

Loading itself is one request of the browser to /ui-api (static/js/shell.js): the same path for a button here, the models page and
the API, and it works while Gradio's queue is slow.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    from modules.schema import LoaderSpec, OptionSpec
    from modules.ui.access import Access
    from modules.ui.parameters import ParameterPanel

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


# The first values may be there before the shell is: it looks at what was noted when it comes.
SHOWN = "(...values) => { window.switchyardShown = values; window.switchyard?.shown(...values); }"
SHOW_OPTIONS = "(name) => { window.switchyard?.showOptions(name); }"


def size_words(size: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("KB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return ""


def model_words(model: dict[str, Any]) -> str:
    """ "wren-chat.gguf · Q4_K_M · 12.4 MB", or the reason why it can't be loaded."""
    if model.get("problem"):
        return f"{model['id']} · damaged"
    quantization = (model.get("quantization") or {}).get("method")
    parts = [model["id"], quantization, size_words(model.get("size_bytes") or 0)]
    return " · ".join(part for part in parts if part)


class ModelBar:
    """The dropdowns in the top bar; `outputs` are the components that `fill` gives values to."""

    def __init__(self, access: Access) -> None:
        self._access = access
        with gr.Row(elem_id="sy-modelbar"):
            self.model = gr.Dropdown(
                [], value=None, label="Model", show_label=False, elem_id="sy-model", interactive=True, min_width=80
            )
            self.backend = gr.Dropdown(
                [], value=None, label="Backend", show_label=False, elem_id="sy-backend", interactive=True, min_width=80
            )
            self._load = gr.Button("Load", variant="primary", size="sm", elem_id="sy-load", min_width=60)
            self._unload = gr.Button("Unload", size="sm", elem_id="sy-unload", min_width=60)
        self.outputs: list[Any] = []

    def wire(self, options: OptionsForm) -> None:
        self._options = options
        self.outputs = [self.model, self.backend, *options.components]
        js_only: dict[str, Any] = {"fn": None, **QUIET}
        self._pick(self.model, self._chosen, [self.model], [self.backend, *options.components])
        self._pick(self.backend, self._picked, [self.model, self.backend], self.outputs)
        table = json.dumps(options.table)
        load = f"(model, backend, ...values) => {{ window.switchyard.loadWith(model, backend, {table}, values); }}"
        self._load.click(inputs=[self.model, self.backend, *options.components], outputs=None, js=load, **js_only)
        self._unload.click(inputs=None, outputs=None, js="() => { window.switchyard.unload(); }", **js_only)
        self.backend.change(inputs=[self.backend], outputs=None, js=SHOW_OPTIONS, **js_only)

    def follow(self, blocks: gr.Blocks, shell: Any, panel: ParameterPanel) -> None:
        """Filled when the page is opened and after every change that the shell tells of, the panel of parameters with it."""
        first = blocks.load(self.fill, None, self.outputs, **QUIET)
        first.then(None, [self.model, self.backend], None, js=SHOWN, **QUIET)
        changed = shell.models_changed(self.fill_again, None, self.outputs, **QUIET)
        self._tell("filled", changed.then(panel.fill, None, panel.outputs, **QUIET))

    def _pick(self, dropdown: gr.Dropdown, answer: Any, inputs: list[Any], outputs: list[Any]) -> None:
        """What a choice changes comes from the server: a Load in the meantime waits for it. What is no choice is sent empty."""
        begin = "(...values) => window.switchyard.picking(...values) ? values : values.map(() => null)"
        picked = dropdown.input(answer, inputs, outputs, js=begin, trigger_mode="multiple", **QUIET)  # "once" would drop a choice
        self._tell("picked", picked)

    def _tell(self, what: str, answered: Any) -> None:
        """The page's choice.js hears that an answer is shown, and what both dropdowns show with it."""
        js = f"(model, backend) => {{ window.switchyard.{what}(model, backend); }}"
        answered.then(None, [self.model, self.backend], None, js=js, **QUIET)

    def _chosen(self, model_id: str | None) -> list[Any]:
        if model_id is None:
            return [gr.skip() for _ in self.outputs[1:]]
        return [self.backends(model_id), *self._options.fill(model_id)]

    def _picked(self, model_id: str | None, backend: str | None) -> list[Any]:
        """A backend that can't take the chosen model offers the bundled one that it can: Load is the next click."""
        other = self._taken_by(backend, model_id)
        if other == model_id:
            return [gr.skip() for _ in self.outputs]
        return [gr.update(value=other), self.backends(other, backend), *self._options.fill(other)]

    def _taken_by(self, backend: str | None, model_id: str | None) -> str | None:
        if backend is None or self._takes(model_id, backend):
            return model_id
        return self.bundled_for(backend) or model_id

    def _takes(self, model_id: str | None, backend: str) -> bool:
        return any(name == backend and ok for name, ok, _ in self._access.backends(model_id))

    def bundled_for(self, backend: str) -> str | None:
        """The bundled model to try a backend with: one that it is the best choice for, else one that it takes."""
        taking = [m["id"] for m in self._access.models() if m.get("bundled") and self._takes(m["id"], backend)]
        best = (i for i in taking if next(name for name, ok, _ in self._access.backends(i) if ok) == backend)
        return next(best, taking[0] if taking else None)

    def backends(self, model_id: str | None, chosen: str | None = None) -> Any:
        """The backends for a model: best first, each that can't take it with the reason; the best is chosen if none is."""
        choices = self._access.backends(model_id)
        best = next((name for name, ok, _ in choices if ok), None)
        return gr.update(choices=[(self._words(*choice), choice[0]) for choice in choices], value=chosen or best)

    def _words(self, name: str, ok: bool, reason: str) -> str:
        title = self._access.title(name)
        return title if ok else f"✕ {title}: {reason}"

    def fill(self) -> list[Any]:
        """Both dropdowns, set to what is loaded, and the options that model is loaded with."""
        models = self._access.models()
        first = next((model["id"] for model in models if not model.get("problem")), None)
        return self._filled(models, *(self._access.active() or (first, None)))

    def fill_again(self, event: gr.EventData) -> list[Any]:
        """After a change: `fill`, unless the event names a choice to keep (static/js/choice.js).

        Its options stay as typed, or are filled in again where the event says so.
        """
        kept = dict(event._data or {})
        models = self._access.models()
        if kept.get("model") not in {model["id"] for model in models}:
            return self.fill()
        backend = kept.get("backend")
        shown = self._filled(models, self._taken_by(backend, kept["model"]), backend)
        return shown if kept.get("options") else [*shown[:2], *(gr.skip() for _ in shown[2:])]

    def _filled(self, models: list[dict[str, Any]], chosen: str | None, backend: str | None) -> list[Any]:
        known = [(model_words(model), model["id"]) for model in models]
        return [gr.update(choices=known, value=chosen), self.backends(chosen, backend), *self._options.fill(chosen)]


class OptionsForm:
    """`components` in the order of `table`: [loader, option, kind, default]."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.components: list[Any] = []
        self.table: list[list[Any]] = []

    def add(self, loader: LoaderSpec, option: OptionSpec) -> None:
        self.components.append(option_control(loader, option))
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        self.table.append([loader.name, option.name, option.kind, default])

    def fill(self, model_id: str | None) -> list[Any]:
        """What each option was for this model, else its default."""
        saved = {loader: self._access.load_options(model_id, loader) for loader in {row[0] for row in self.table}}
        return [gr.update(value=_shown(kind, saved[loader].get(name, default))) for loader, name, kind, default in self.table]


def _shown(kind: str, value: Any) -> Any:
    """An option's value as its control holds it."""
    if kind == "paths":
        return "\n".join(value or ())
    return "" if value is None and kind in ("str", "path") else value


WORDS = {
    "ctx": "context",
    "gpu": "GPU",
    "cpu": "CPU",
    "lora": "LoRA",
    "kv": "KV",
    "swa": "SWA",
    "numa": "NUMA",
    "attn": "attention",
}


def option_label(name: str) -> str:
    """gpu_layers -> "GPU layers", ctx_size -> "Context size"."""
    text = " ".join(WORDS.get(word, word) for word in name.split("_"))
    return text[:1].upper() + text[1:]


def option_control(loader: LoaderSpec, option: OptionSpec) -> Any:
    """The Gradio component of one load option."""
    common: dict[str, Any] = {
        "label": option_label(option.name),
        "info": option.help,
        "interactive": True,
        "elem_id": f"sy-o-{loader.name}-{option.name}",
    }
    if option.kind == "bool":
        return gr.Checkbox(value=bool(option.default), **common)
    if option.kind == "choice":
        return gr.Dropdown(choices=list(option.choices), value=option.default, **common)
    if option.kind in ("int", "float"):
        return gr.Number(value=option.default, precision=0 if option.kind == "int" else None, **common)
    if option.kind == "paths":
        return gr.Textbox(value="\n".join(option.default or ()), lines=2, **common)
    return gr.Textbox(value=option.default or "", **common)


def load_options_form(access: Access) -> OptionsForm:
    """One group per loader; the page shows that of the chosen backend."""
    form = OptionsForm(access)
    for loader in access.loaders():
        with gr.Group(elem_classes=["sy-options", f"sy-options-{loader.name}"]):
            gr.Markdown(
                f"### Load options of {loader.title}\nThey count for the Load button at the top and are kept for each model."
            )
            with gr.Row(elem_classes=["sy-options-grid"]):
                for option in loader.options:
                    if not option.advanced:
                        form.add(loader, option)
            advanced = [option for option in loader.options if option.advanced]
            if advanced:
                with gr.Accordion("Advanced", open=False), gr.Row(elem_classes=["sy-options-grid"]):
                    for option in advanced:
                        form.add(loader, option)
    return form
