"""The Evaluate page: one view of ours (static/js/evaluate.js) over /ui-api/evaluations."""

from __future__ import annotations

from typing import Any

from modules.ui.views import view


def evaluate_tab() -> Any:
    """Models × backends × texts, runs in the background, table, plots, answers side by side."""
    return view("sy-evaluate", "evaluate", "sy-evaluate-view")
