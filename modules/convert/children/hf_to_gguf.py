"""Run llama.cpp's converter on one model folder, in the Transformers environment.

    python -m modules.convert.children.hf_to_gguf CONVERTER_DIR MODEL_DIR OUT TYPE NAME [PACKED]

PACKED is for GPTQ checkpoints: Q4_0, Q4_1 or Q8_0 keeps their numbers in blocks of that type (TYPE is for all else), "float"
dequantises them.

The converter's files stay as they are; what is changed is changed here, at run time: no remote code, progress as numbers, GPT-2's
pre-tokenizer recognised by what it is, and the merge order as scores.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from modules.convert.children.report import Report
from modules.convert.children.tokenizer_rules import merge_scores, plain_byte_level
from modules.errors import AppError, CorruptModel, IncompatibleModel, StorageFull


def main() -> int:
    report = Report()
    converter, model, out, kind, name, packed = (*sys.argv[1:], "")[:6]
    try:
        _convert(report, Path(converter), Path(model), Path(out), kind, name, packed)
    except AppError as error:
        report.error(error)
        return 1
    report.done(path=out)
    return 0


def _convert(report: Report, converter: Path, model: Path, out: Path, kind: str, name: str, packed: str) -> None:
    report.stage("Starting the converter")
    sys.path.insert(0, str(converter))
    _forbid_remote_code()
    _report_writing(report)
    errors = _collect_errors(report)

    import convert_hf_to_gguf  # type: ignore[import-not-found]

    _restore_old_names()
    tokenizer = _read_tokenizer(model)
    _recognise_plain_byte_level(report, tokenizer)
    _score_by_merge_order(tokenizer)
    if packed:
        from modules.convert.children import gptq_layers

        gptq_layers.install(report, model, None if packed == "float" else packed)
    sys.argv = ["convert_hf_to_gguf", str(model), "--outfile", str(out), "--outtype", kind.lower(), "--model-name", name]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise _refusal(model, errors[-1] if errors else f"exit status {ended.code}") from ended
    except NotImplementedError as error:
        raise _refusal(model, str(error)) from error
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise StorageFull("The disk is full.", hint="Free some space, or choose another folder with --out.") from error
        raise
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        logging.exception("the converter stopped")
        raise CorruptModel(
            f"llama.cpp's converter can't read {model.name}: {type(error).__name__}: {error}.",
            hint="Check that the folder's files belong together and are complete; fetch the model again.",
        ) from error


def _refusal(model: Path, reason: str) -> IncompatibleModel:
    return IncompatibleModel(
        f"llama.cpp's converter does not take {model.name}: {reason.strip('.')}.",
        hint="Load the model with the Transformers loader, or get a GGUF that its publisher made.",
    )


def _forbid_remote_code() -> None:
    """The converter asks for trust_remote_code in places; the answer is always no."""
    from transformers import AutoConfig, AutoTokenizer

    def safe(original: Any) -> Any:
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            kwargs["trust_remote_code"] = False
            return original(*args, **kwargs)

        return from_pretrained

    for cls in (AutoConfig, AutoTokenizer):
        cls.from_pretrained = safe(cls.from_pretrained)


def _report_writing(report: Report) -> None:
    """gguf-py draws its progress with tqdm: the same numbers go to the parent instead."""
    import tqdm  # type: ignore[import-untyped]

    class Bar:
        def __init__(self, *args: Any, total: float | None = None, **kwargs: Any) -> None:
            self.total, self.n = total, 0.0

        def update(self, count: float = 1) -> None:
            self.n += count
            report.stage("Writing the GGUF", min(1.0, self.n / self.total) if self.total else None)

        def set_description(self, *args: Any, **kwargs: Any) -> None:
            return None

        def reset(self, total: float | None = None) -> None:
            self.total, self.n = total, 0.0

        def close(self) -> None:
            return None

    tqdm.tqdm = Bar


def _collect_errors(report: Report) -> list[str]:
    """The converter says what is wrong through its logger, then exits."""
    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.ERROR:
                errors.append(text)
            elif "-->" in text:
                report.stage("Reading the tensors")

    logging.getLogger().addHandler(Handler())
    return errors


def _read_tokenizer(model: Path) -> dict[str, Any]:
    try:
        value = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # a SentencePiece model needs none
        return {}
    except ValueError as error:
        raise CorruptModel("tokenizer.json is no valid JSON.", hint="Fetch the tokenizer again.") from error
    return value if isinstance(value, dict) else {}


def _restore_old_names() -> None:
    """Transformers 5 moves or drops settings of old architectures that the converter asks for by their old names."""
    from conversion import ModelBase  # type: ignore[import-not-found]

    original = ModelBase.load_hparams

    def load_hparams(*args: Any, **kwargs: Any) -> dict[str, Any]:
        values: dict[str, Any] = original(*args, **kwargs)
        rope = values.get("rope_parameters") or {}
        if "partial_rotary_factor" in rope:  # GPT-NeoX
            values.setdefault("rotary_pct", rope["partial_rotary_factor"])
        if "n_positions" in values:  # GPT-2
            values.setdefault("n_ctx", values["n_positions"])
        return values

    ModelBase.load_hparams = staticmethod(load_hparams)


def _recognise_plain_byte_level(report: Report, tokenizer: dict[str, Any]) -> None:
    from conversion import TextModel

    original = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, loaded: Any) -> str:
        try:
            return str(original(self, loaded))
        except NotImplementedError:
            different = plain_byte_level(tokenizer)
            if different:
                raise IncompatibleModel(
                    f"llama.cpp does not know this model's tokenizer: {different}.",
                    hint="Load the model with the Transformers loader, or get a GGUF that its publisher made.",
                ) from None
            report.note("The tokenizer is plain byte-level BPE (gpt-2).")
            return "gpt-2"

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def _score_by_merge_order(tokenizer: dict[str, Any]) -> None:
    import gguf

    scores = merge_scores(tokenizer)
    names = {number: token for token, number in ((tokenizer.get("model") or {}).get("vocab") or {}).items()} if scores else {}
    original = gguf.LlamaHfVocab.get_token_score

    def get_token_score(self: Any, token_id: int) -> float:
        return float(scores.get(names.get(token_id, ""), original(self, token_id)))

    gguf.LlamaHfVocab.get_token_score = get_token_score


if __name__ == "__main__":
    sys.exit(main())
