"""Talk to the trained model and check its answers: ``python models/recipe/sample.py models/wren-6m``.

Instead of a folder it also takes the address of a running Switchyard (``http://127.0.0.1:5000``) and asks the model that is
loaded there: the way for RWKV, which transformers does not run.

Every prompt of ``checks.yaml`` is asked with and without a system prompt, greedily and at temperature 0.7. An answer
is right if it holds the key phrases and ended by itself. ``--show`` prints the dialogues as Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Result:
    """One dialogue: the user's turns, the answers, and whether the last answer is right and ended by itself."""

    turns: list[str]
    answers: list[str]
    right: bool
    ended: bool


class Speaker:
    """Something that answers conversations."""

    def answer(self, messages: list[dict[str, str]], temperature: float) -> tuple[str, bool]:
        """The next assistant message, and whether it ended with an end-of-turn token. Temperature 0 is greedy."""
        raise NotImplementedError

    def check(self, case: dict[str, Any], system: str, temperature: float) -> Result:
        """Ask the turns of a case in order and judge the last answer."""
        turns = case["say"] if isinstance(case["say"], list) else [case["say"]]
        messages = [{"role": "system", "content": system}] if system else []
        answers, ended = [], True
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            text, stopped = self.answer(messages, temperature)
            ended = ended and stopped
            answers.append(text)
            messages.append({"role": "assistant", "content": text})
        right = all(re.search(pattern, answers[-1], re.IGNORECASE) for pattern in case["all"])
        return Result(turns, answers, right and ended, ended)


class FolderSpeaker(Speaker):
    """The model of a folder, in float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)  # the matrices are so small that threads would only wait for each other
        torch.manual_seed(1)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def answer(self, messages: list[dict[str, str]], temperature: float) -> tuple[str, bool]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
        if not temperature:
            sampling = {"do_sample": False, "temperature": None, "top_p": None}
        out = self.model.generate(ids, max_new_tokens=400, attention_mask=self.torch.ones_like(ids), **sampling)
        new = out[0, ids.shape[1] :]
        ended = int(new[-1]) in self.model.generation_config.eos_token_id
        return self.tokenizer.decode(new, skip_special_tokens=True), ended


class ServerSpeaker(Speaker):
    """The model that is loaded in a Switchyard, over its OpenAI API."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") + "/v1/chat/completions"
        self.asked = 0

    def answer(self, messages: list[dict[str, str]], temperature: float) -> tuple[str, bool]:
        self.asked += 1
        body = {"messages": messages, "temperature": temperature, "top_p": 1, "max_tokens": 400, "seed": self.asked}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            choice = json.load(reply)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"] == "stop"


def runs(speaker: Speaker, cases: list[dict[str, Any]]) -> Iterator[tuple[str, list[Result]]]:
    """The results of all cases for each way of asking."""
    for temperature in (0.0, 0.7):
        for system in ("", SYSTEM):
            name = f"{'greedy' if not temperature else f'temperature {temperature}'}, {'with' if system else 'no'} system prompt"
            yield name, [speaker.check(case, system, temperature) for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or address of a running Switchyard")
    parser.add_argument("--show", action="store_true", help="print all dialogues, not only the wrong ones")
    args = parser.parse_args()
    cases = yaml.safe_load((Path(__file__).parent / "checks.yaml").read_text())
    speaker = ServerSpeaker(args.model) if args.model.startswith("http") else FolderSpeaker(Path(args.model))
    for name, results in runs(speaker, cases):
        print(f"\n## {name}: {sum(r.right for r in results)} of {len(results)} right, "
              f"{sum(r.ended for r in results)} ended by themselves\n")  # fmt: skip
        for result in results:
            if args.show or not result.right:
                for turn, answer in zip(result.turns, result.answers, strict=True):
                    print(f"> {turn}\n\n{answer}\n")
                print("---" if result.right else "--- WRONG" + ("" if result.ended else " (did not end)"), flush=True)


if __name__ == "__main__":
    main()
