"""Gradio's theme in the product's colours: every variable points at one of static/css/tokens.css, in light and in dark."""

from __future__ import annotations

from typing import Any

import gradio as gr

_COLOURS = {
    "body_background_fill": "bg",
    "body_text_color": "text",
    "body_text_color_subdued": "muted",
    "background_fill_primary": "surface",
    "background_fill_secondary": "bg",
    "border_color_primary": "line",
    "border_color_accent": "accent",
    "color_accent_soft": "accent-soft",
    "link_text_color": "accent",
    "link_text_color_hover": "accent-strong",
    "link_text_color_visited": "accent",
    "link_text_color_active": "accent",
    "block_background_fill": "surface",
    "block_border_color": "line",
    "block_info_text_color": "muted",
    "block_label_text_color": "muted",
    "block_label_background_fill": "surface",
    "block_title_text_color": "text",
    "panel_background_fill": "surface",
    "panel_border_color": "line",
    "accordion_text_color": "text",
    "checkbox_background_color": "surface",
    "checkbox_background_color_selected": "accent",
    "checkbox_border_color": "line-strong",
    "checkbox_border_color_selected": "accent",
    "checkbox_label_background_fill": "surface",
    "checkbox_label_background_fill_hover": "sunken",
    "checkbox_label_background_fill_selected": "accent-soft",
    "checkbox_label_text_color": "text",
    "checkbox_label_text_color_selected": "text",
    "input_background_fill": "surface",
    "input_border_color": "line",
    "input_border_color_hover": "line-strong",
    "input_border_color_focus": "accent",
    "input_placeholder_color": "muted",
    "slider_color": "accent",
    "code_background_fill": "code",
    "button_primary_background_fill": "accent",
    "button_primary_background_fill_hover": "accent-strong",
    "button_primary_border_color": "accent",
    "button_primary_text_color": "on-accent",
    "button_secondary_background_fill": "surface",
    "button_secondary_background_fill_hover": "sunken",
    "button_secondary_border_color": "line",
    "button_secondary_text_color": "text",
    "table_text_color": "text",
}


def make_theme() -> Any:
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_lg,
    )
    values = {}
    for name, token in _COLOURS.items():
        values[name] = f"var(--sy-{token})"
        values[f"{name}_dark"] = f"var(--sy-{token})"
    return theme.set(
        **values,
        block_shadow="none",
        block_shadow_dark="none",
        input_border_width="1px",
        input_border_width_dark="1px",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_primary_shadow="none",
        button_secondary_shadow="none",
    )
