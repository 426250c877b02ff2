"""The Quantise page: one view of ours (static/js/quantize.js) over /ui-api/quantizations."""

from __future__ import annotations

from typing import Any

from modules.ui.views import view


def quantize_tab() -> Any:
    """Settings with help, jobs with progress and loss per layer."""
    return view("sy-quantize", "quantize", "sy-quantize-view")
