"""The Batch page: one view of ours (static/js/batch.js) over /ui-api/batches."""

from __future__ import annotations

from typing import Any

from modules.ui.views import view


def batch_tab() -> Any:
    """Upload, progress, pause, results."""
    return view("sy-batch", "batch", "sy-batch-view")
