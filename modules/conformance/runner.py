"""Runs the probes on models and gathers feature × loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import httpx

from modules.conformance.client import TIMEOUT_S, Api, Failed, Unsupported
from modules.conformance.probes import PROBES

State = Literal["pass", "fail", "unsupported"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One probe on one loader. `reason` says why not, or what was found."""

    state: State
    reason: str
    ms: int


@dataclass
class Column:
    """One loader with the model it was tried on. `error` stands for all probes where the model could not be loaded."""

    loader: str
    model: str
    cells: dict[str, Cell] = field(default_factory=dict)
    error: str = ""

    def count(self, state: State) -> int:
        return sum(cell.state == state for cell in self.cells.values())


OnCell = Callable[[Column, str], None]


async def run_column(http: httpx.AsyncClient, column: Column, on_cell: OnCell | None = None, only: Iterable[str] = ()) -> None:
    """Every probe, one after the other: they share the loader's slots with whoever uses the server."""
    wanted = frozenset(only)
    api = Api(http, column.model)
    for probe in PROBES:
        if wanted and probe.name not in wanted:
            continue
        if on_cell is not None:
            on_cell(column, probe.title)
        began = time.perf_counter()
        state: State = "pass"
        try:
            reason = await probe.run(api) or ""
        except Unsupported as error:
            state, reason = "unsupported", str(error)
        except Failed as error:
            state, reason = "fail", str(error)
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            state, reason = "fail", f"the answer is not what it should be: {type(error).__name__} {str(error)[:120]}"
        column.cells[probe.name] = Cell(state, reason, round(1000 * (time.perf_counter() - began)))


def http_client(url: str, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
    """For the server at `url`. The environment's proxies don't apply: it is this machine."""
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def report(columns: list[Column]) -> dict[str, Any]:
    """JSON-safe: rows of features, a cell for each column."""
    return {
        "columns": [
            {
                "loader": column.loader,
                "model": column.model,
                "error": column.error,
                "passed": column.count("pass"),
                "failed": column.count("fail"),
                "unsupported": column.count("unsupported"),
            }
            for column in columns
        ],
        "rows": [
            {
                "name": probe.name,
                "title": probe.title,
                "group": probe.group,
                "cells": [asdict(cell) if (cell := column.cells.get(probe.name)) else None for column in columns],
            }
            for probe in PROBES
        ],
    }
