"""The fit planner: for a model and a machine, which loader, quantisation, context, cache and placement fit, by headers alone.

types.py     a model's Shape, the Machine, what a loader needs (Memory), the answers (Fit, Verdict)
shape.py     ModelFiles -> Shape: config.json and the tensors' table, or a GGUF's keys
machine.py   this machine: memory, GPUs, disk, cores, instruction sets, memory bandwidth
planner.py   Shape × Machine × loaders -> [Fit], ranked; the nearest fit to what was asked
routes.py    what converting or quantising a model would give, with its shape
repository.py   the same for a repository that is not here yet
admission.py what a load needs before it starts, and the refusal of one that can't fit
service.py   the plan as JSON     cli.py   server.py plan

What a loader needs for a model is the loader's own knowledge: `estimate` and `settings` in loaders/NAME.py.
"""

from __future__ import annotations

from modules.plan.planner import nearest, plan, verdict
from modules.plan.types import Fit, Gpu, Machine, Memory, Setting, Shape, Verdict

__all__ = ["Fit", "Gpu", "Machine", "Memory", "Setting", "Shape", "Verdict", "nearest", "plan", "verdict"]
