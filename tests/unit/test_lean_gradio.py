"""Gradio imported by the product writes no stub files, and is whole otherwise."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT

CODE = """
import ast, json, sys
parsed = []
parse = ast.parse
ast.parse = lambda source, *a, **k: parsed.append(source) or parse(source, *a, **k)
{first}
import gradio
with gradio.Blocks() as blocks:
    box = gradio.Textbox("x")
    box.change(lambda x: x, box, box)
components = sum("(Component" in str(source) or "(FormComponent" in str(source) for source in parsed)
print(json.dumps({{"parsed": components, "events": len(blocks.fns), "hooks": [str(type(f)) for f in sys.meta_path]}}))
"""


def imported(first: str) -> dict[str, object]:
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(first=first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    return dict(json.loads(done.stdout))


def test_no_component_is_parsed_for_a_stub_file() -> None:
    own = imported("")
    assert isinstance(own["parsed"], int) and own["parsed"] > 10, (
        "Gradio has changed: lean_gradio has nothing to leave out any more"
    )
    lean = imported("import modules.ui")
    assert lean["parsed"] == 0
    assert lean["events"] == own["events"] == 1
    assert "lean_gradio" not in str(lean["hooks"]), "the hook goes when it has done its work"
