"""Make another form of a model: Hugging Face folder -> GGUF, GGUF -> GGUF of another type, by llama.cpp's own tools.

gguf.py        convert(job, on_progress): the steps, the checks, the file that appears only when it is whole
cli.py         server.py convert
library.py     puts llama.cpp's converter into the Transformers environment
process.py     a step in a child process    children/    what runs there
gguf_types.py  the names of the types
gptq.py        which type holds a GPTQ checkpoint as it is
flexgen.py     an OPT -> FlexGen's arrays
unpickle.py    pickled weights -> safetensors, in a fenced process, when their owner allows it
"""

from __future__ import annotations

from modules.convert.gguf import Converted, ConvertJob, convert, default_output, library_types
from modules.convert.unpickle import convert_pickle

__all__ = ["ConvertJob", "Converted", "convert", "convert_pickle", "default_output", "library_types"]
