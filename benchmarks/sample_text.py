"""A text from the bundled model's own recipe (stories, questions and answers): no corpus, so free of other people's licences.

`python benchmarks/sample_text.py --seed 1 > modules/quantize/calibration.txt` made the bundled calibration sample; other seeds
give held-out text for perplexity.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "models" / "recipe"


def sample_text(seed: int, size: int) -> str:
    """About `size` characters, the same for the same seed."""
    sys.path.insert(0, str(RECIPE))
    try:
        from documents import expand
        from stories import story
    finally:
        sys.path.remove(str(RECIPE))
    rng = random.Random(f"calibration {seed}")
    facts = [(expand(entry), entry["answer"]) for entry in yaml.safe_load((RECIPE / "facts.yaml").read_text(encoding="utf-8"))]
    common = yaml.safe_load((RECIPE / "common.yaml").read_text(encoding="utf-8"))["tables"]
    parts: list[str] = []
    length = 0
    while length < size:
        turns = []
        for _ in range(rng.randint(1, 3)):
            draw = rng.random()
            if draw < 0.45:
                asked, told, _cast = story(rng)
            elif draw < 0.8:
                questions, told = rng.choice(facts)
                asked = rng.choice(questions)
            else:
                table = rng.choice(common)
                key, value = rng.choice(list(table["facts"].items()))
                asked = rng.choice(table["ask"]).format(k=key)
                told = table["answer"].format(k=key, K=key[:1].upper() + key[1:], v=value)
            turns.append((asked, told))
        if rng.random() < 0.3:
            text = "\n\n".join(told for _, told in turns) + "\n\n"
        else:
            text = "".join(
                f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{told}<|im_end|>\n" for asked, told in turns
            )
        parts.append(text)
        length += len(text)
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=260_000, help="characters")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    sys.stdout.write(sample_text(arguments.seed, arguments.size))


if __name__ == "__main__":
    main()
