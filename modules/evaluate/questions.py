"""Lists of questions for answers side by side: the study's five, or a file of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modules.errors import ConfigError, InvalidParameter
from modules.evaluate.plan import QuestionPlan
from modules.yaml_file import read_yaml

BUNDLED = Path(__file__).with_name("questions.yaml")
MAX_QUESTIONS = 500


def read_questions(path: Path = BUNDLED, max_tokens: int = 96, reference: int | None = None) -> QuestionPlan:
    """A .yaml or .json list (or a map of "questions" and "system"), or a text with one question per line.

    Raises InvalidParameter for a file without questions.
    """
    if not path.is_file():
        raise InvalidParameter(
            f"There is no file {path}.", hint="Give a list of questions: one per line, or YAML.", param="questions"
        )
    try:
        data = _read(path)
    except (ConfigError, OSError, ValueError) as error:
        raise InvalidParameter(f"{path.name} can't be read: {error}", param="questions") from error
    return plan_of(data, path.name, max_tokens, reference)


def plan_of(data: Any, name: str, max_tokens: int, reference: int | None = None) -> QuestionPlan:
    """The plan in a list or a map. Raises InvalidParameter."""
    system = ""
    if isinstance(data, dict):
        system, data = str(data.get("system") or ""), data.get("questions")
    questions = [str(q).strip() for q in data if str(q).strip()] if isinstance(data, list) else []
    if not 1 <= len(questions) <= MAX_QUESTIONS:
        raise InvalidParameter(
            f"{name} holds {len(questions)} questions.", hint=f"Between 1 and {MAX_QUESTIONS} can be asked.", param="questions"
        )
    return QuestionPlan(tuple(questions), system, max_tokens, reference)


def _read(path: Path) -> Any:
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path)
    text = path.read_text(encoding="utf-8-sig")
    return json.loads(text) if path.suffix == ".json" else text.splitlines()
