"""Make a GPTQ checkpoint from a Hugging Face folder: GPTQ (Frantar et al. 2022) or round to nearest.

settings.py      what can be asked for, checked              cli.py       server.py quantize
process.py       quantize(job, on_event): the child process  child.py     what runs there
provenance.py    how a checkpoint was made, read back        layout.py    what each packed layer of a file holds

In the child, with torch:
_calibration.py  text -> token windows        _tree.py    decoder blocks and linear layers, from the module tree
_weights.py      tensors of the base, lazily  _grid.py    scales and zero points
_gptq.py         layers that share inputs     _job.py     block after block, resumable
_packing.py      packed integers (NumPy)      _checkpoint.py  the files of the result
_names.py        parameters and their keys    _failures.py    errors of Python and torch as the product's
"""
