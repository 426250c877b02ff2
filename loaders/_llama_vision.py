"""Images for llama.cpp: the projector (mmproj) beside an open model, and prompts with images as its KV cache holds them."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders._llama_capi import NoLlamaLibrary
from loaders._llama_mtmd import IMAGE, InputText, MtmdLibrary
from loaders._pictures import check_marks, decode
from modules.detect.projector import check_projector, find_projector
from modules.errors import GenerationFailed, IncompatibleModel, LoadError, LoadOutOfMemory, UnsupportedParameter
from modules.schema import LoadProgress

if TYPE_CHECKING:
    from loaders._llama_load import LlamaModel
    from modules.engine import Progress

_USUAL, _LARGE = (640, 480), (4096, 4096)  # pixels
_NO_PROJECTOR = "If the model was made to see, put its mmproj file into its folder and load it again."
_LEFT_OUT = "It was loaded without its projector (no_mmproj)."


@dataclass(frozen=True, slots=True)
class Span:
    """An image, or a slice of one: the positions `start` to `end` of a prompt, `tokens` cells of the KV cache (more than
    positions where a model counts them by rows and columns), and llama.cpp's `chunk`."""

    start: int
    end: int
    tokens: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One entry for each position: a token's id, or a negative number that stands for this very image and no other."""

    ids: list[int]
    spans: tuple[Span, ...] = ()

    def tokens(self, positions: int) -> int:
        """Cells of the KV cache that the first `positions` take."""
        return positions + sum(span.tokens - span.end + span.start for span in self.spans if span.end <= positions)

    @property
    def words(self) -> list[int]:
        """The ids without the images."""
        return [token for token in self.ids if token >= 0] if self.spans else self.ids


class Vision:
    """An open projector. `token` is what stands for an image in a prompt, `cost` the tokens an ordinary picture takes, `largest`
    those that a model which is not `causal` must read at once."""

    def __init__(self, lib: MtmdLibrary, model: LlamaModel, path: Path, options: dict[str, Any], threads: int) -> None:
        from loaders._llama_load import FLASH_ATTENTION

        self._lib, self._model = lib, model
        self.path, self.token = path, lib.marker
        lib.mtmd_log_set(model.log.callback, None)
        lib.mtmd_helper_log_set(model.log.callback, None)
        model.log.lines.clear()
        params = lib.params(
            use_gpu=options["gpu_layers"] != 0,
            print_timings=False,
            n_threads=threads,
            flash_attn_type=FLASH_ATTENTION[options["flash_attn"]],
        )
        handle = lib.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not handle:
            raise _refused(path, list(model.log.lines))
        self._handle = int(handle)
        try:
            if not lib.mtmd_support_vision(self._handle):
                raise IncompatibleModel(f"{path.name} reads no images.", hint="Load the model without it (no_mmproj).")
            self.causal = not lib.mtmd_decode_use_non_causal(self._handle, None)
            self.cost, _ = self._tokens(_USUAL)
            self.largest = 0 if self.causal else self._tokens(_LARGE)[1]
        except LoadError:
            self.close()
            raise

    def close(self) -> None:
        self._lib.mtmd_free(self._handle)

    @contextmanager
    def read(self, prompt: str, files: Sequence[str], *, add_special: bool) -> Iterator[Prompt]:
        """The prompt with its images, `files` in base64; its spans are good inside the block only. Raises InvalidImage, and
        InvalidParameter for another number of marks in the prompt."""
        check_marks(prompt, self.token, files)
        names = [hashlib.sha256(file.encode("ascii")).hexdigest() for file in files]
        bitmaps = []
        try:
            for name, file in zip(names, files, strict=True):
                picture = decode(file)
                bitmaps.append(self._bitmap(picture.size, picture.tobytes(), name))
            with self._chunks(prompt, bitmaps, add_special) as chunks:
                yield self._prompt(chunks)
        finally:
            for bitmap in bitmaps:
                self._lib.mtmd_bitmap_free(bitmap)

    def encode(self, span: Span) -> Any:
        """The vectors of an image (float32, llama.cpp's own memory, valid until the next). Raises GenerationFailed."""
        status = self._lib.mtmd_encode_chunk(self._handle, span.chunk)
        if status:
            raise GenerationFailed(f"llama.cpp could not read the image: {self._model.log.last()}.", hint="Send another image.")
        return self._lib.mtmd_get_output_embd(self._handle)

    def decode(self, span: Span, vectors: Any) -> int:
        """Put an image behind what the cache holds; llama_decode's status. Positions and masks are the projector's own affair."""
        after = ctypes.c_int32(span.start)
        model = self._model
        return int(
            self._lib.mtmd_helper_decode_image_chunk(
                self._handle, model.ctx, span.chunk, vectors, span.start, 0, model.n_batch, ctypes.byref(after), None, None
            )
        )

    # --- llama.cpp's own forms ------------------------------------------------------------------------------

    def _bitmap(self, size: tuple[int, int], pixels: bytes | None, name: str) -> int:
        """RGB pixels; None only counts the tokens."""
        bitmap = int(self._lib.mtmd_bitmap_init(*size, pixels))
        self._lib.mtmd_bitmap_set_id(bitmap, name.encode("ascii"))
        return bitmap

    @contextmanager
    def _chunks(self, prompt: str, bitmaps: Sequence[int], add_special: bool) -> Iterator[list[int]]:
        lib = self._lib
        data = prompt.encode("utf-8", "replace")
        text = InputText(data, len(data), add_special, True)
        handles = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
        chunks = lib.mtmd_input_chunks_init()
        try:
            status = lib.mtmd_tokenize(self._handle, chunks, ctypes.byref(text), handles, len(bitmaps))
            if status:
                raise GenerationFailed(f"llama.cpp could not take the images: {self._model.log.last()}.", hint="Send others.")
            yield [int(lib.mtmd_input_chunks_get(chunks, index)) for index in range(lib.mtmd_input_chunks_size(chunks))]
        finally:
            lib.mtmd_input_chunks_free(chunks)

    def _prompt(self, chunks: Sequence[int]) -> Prompt:
        lib = self._lib
        ids: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            if lib.mtmd_input_chunk_get_type(chunk) != IMAGE:
                ids += self._words(chunk)
                continue
            tokens, positions = int(lib.mtmd_input_chunk_get_n_tokens(chunk)), int(lib.mtmd_input_chunk_get_n_pos(chunk))
            if not self.causal and tokens > self._model.n_ubatch:
                raise UnsupportedParameter(
                    f"The image takes {tokens} tokens, which this model must read at once; {self._model.n_ubatch} fit.",
                    hint=f"Make it smaller, or load the model with batch_size and ubatch_size {tokens}.",
                    param="messages",
                )
            name = (lib.mtmd_input_chunk_get_id(chunk) or b"").decode("ascii")
            spans.append(Span(len(ids), len(ids) + positions, tokens, chunk))
            ids += [_stand_in(f"{name} {len(spans)} {positions} {tokens}")] * positions
        return Prompt(ids, tuple(spans))

    def _words(self, chunk: int) -> list[int]:
        count = ctypes.c_size_t()
        tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return [int(token) for token in tokens[: count.value]]

    def _tokens(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens of a picture of this size, those of its largest slice)."""
        lib = self._lib
        bitmap = self._bitmap(size, None, "")
        try:
            with self._chunks(f"a{self.token}", [bitmap], False) as chunks:
                kinds = [(lib.mtmd_input_chunk_get_type(c), int(lib.mtmd_input_chunk_get_n_tokens(c))) for c in chunks]
                letter = self._model.encode("a", False)
                if not chunks or self._words(chunks[0])[: len(letter)] != letter:
                    raise IncompatibleModel(f"{self._model.lib.path.name} reads prompts with images in another way.")
        except GenerationFailed as error:
            raise IncompatibleModel(error.message, hint="Load the model without the projector (no_mmproj).") from error
        finally:
            lib.mtmd_bitmap_free(bitmap)
        images = [tokens for kind, tokens in kinds if kind == IMAGE]
        return sum(tokens for _, tokens in kinds) - len(letter), max(images, default=0)


def open_vision(
    model: LlamaModel, path: Path | None, options: dict[str, Any], threads: int, progress: Progress
) -> tuple[Vision | None, str]:
    """(the projector at `path`, "") or (None, why the model reads no images). Raises a LoadError for a wrong one."""
    if path is None:
        return None, _LEFT_OUT if options["no_mmproj"] else _NO_PROJECTOR
    if find_spec("PIL") is None:
        return None, "Reading images needs Pillow, which is not in this environment: install the llama.cpp set again."
    try:
        lib = MtmdLibrary(model.lib)
    except NoLlamaLibrary as error:
        return None, f"This build of llama.cpp reads none ({error})."
    progress(LoadProgress("Reading the projector"))
    return Vision(lib, model, path, options, threads), ""


def projector_for(model: Path, options: dict[str, Any]) -> Path | None:
    """The projector that the options name, or that lies beside the model; None for none. Raises a LoadError for a wrong one."""
    if options["no_mmproj"]:
        return None
    if options["mmproj"]:
        path: Path | None = model.parent / Path(options["mmproj"]).expanduser()
        path = path if path.is_file() else Path(options["mmproj"]).expanduser()
    else:
        found = find_projector(model)
        path = found.path if found is not None else None
    if path is not None:
        check_projector(path, model)
    return path


def _stand_in(name: str) -> int:
    """A negative number for an image, its place among the prompt's images and its size: the same number, the same cells."""
    return -1 - int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _refused(path: Path, lines: list[str]) -> LoadError:
    from loaders._llama_load import OUT_OF_MEMORY, first_reason

    text = "\n".join(lines)
    hint = "Get the mmproj file that was published with this model, or load it without one (no_mmproj)."
    if "mismatch between text model" in text:
        return IncompatibleModel(f"{path.name} is the projector of another model: {first_reason(lines, 'mismatch')}.", hint=hint)
    if OUT_OF_MEMORY.search(text):
        return LoadOutOfMemory("The memory is too small for the projector beside this model.", hint="Load it with no_mmproj.")
    reason = first_reason(lines, "failed to load").rpartition(f"{path}': ")[2].replace(str(path), path.name)
    return IncompatibleModel(f"llama.cpp can't use the projector {path.name}: {reason}.", hint=hint)
