"""Which flexgen the loader was written for: hashes of the functions it replaces or relies upon. Standard library only."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from modules.errors import BackendUnavailable

# Function -> the first 16 digits of the SHA-256 of its source text in flexgen 0.1.8.
FINGERPRINTS = {
    "flex_opt.py": {
        "init_weight_list": "6af6599e8d8167a2",
        "get_choice": "463a7985a82d6856",
        "InputEmbed.load_weight": "b6f09d1042895533",
        "InputEmbed.forward": "2325094cc3e995a2",
        "OutputEmbed.init_weight": "10b5882efd8fbe98",
        "OutputEmbed.load_weight": "dbc170ac27e241cb",
        "OutputEmbed.forward": "79c3135420cc4e13",
        "SelfAttention.init_weight": "cb195e7f25e6eb73",
        "SelfAttention.load_weight": "53c352557de56a7b",
        "SelfAttention.init_cache_one_gpu_batch": "6a0cec0569a7bc21",
        "SelfAttention.load_cache": "44027997b4a8dcc4",
        "SelfAttention.store_cache": "06704b73e643853a",
        "SelfAttention.forward": "7b1bb012342f2409",
        "MLP.init_weight": "4cbf44e4d4fcf200",
        "MLP.load_weight": "1a528ae88680dd38",
        "MLP.forward": "9944c80ff16c128f",
        "TransformerLayer.forward": "1c596dae7534d14e",
        "TransformerLayer.load_weight": "96acadd41cd3ede4",
        "OptLM.__init__": "b5b988fa75b311af",
        "OptLM.init_weight": "a1151c868ebf530d",
        "OptLM.load_weight": "4496e73912897c76",
        "OptLM.load_cache": "e4796489bd96f17c",
        "OptLM.store_cache": "c79f722a37ea0726",
        "OptLM.load_hidden": "4250404fcc764554",
        "OptLM.store_hidden": "a8deeb46c20b11ad",
        "OptLM.compute_layer": "5fb886a6d1c50785",
        "OptLM.sync": "84ab519bf1e4fa5c",
        "OptLM.update_attention_mask": "c0d699c0f9f40291",
        "OptLM.generate": "24e657f576cfad14",
        "OptLM.generation_loop_overlap_multi_batch": "9fbeab402509c0e0",
    },
    "pytorch_backend.py": {
        "TorchTensor.load_from_np_file": "79a5f76f6ca6ac40",
        "TorchTensor.load_from_np": "242b61b0f430ab97",
        "TorchTensor.move": "72407b32cb4f236b",
        "TorchTensor.copy": "72cd7c0635aa6d88",
        "TorchTensor.smart_copy": "ad5af97e72e3eab4",
        "TorchTensor.delete": "d466efa1e1da3b58",
        "TorchDevice.__init__": "3219c109e7e70945",
        "TorchDevice.allocate": "0679cb60b5c487f5",
        "TorchDevice.mha": "bc593b24b561ca3e",
        "TorchDevice.mha_gen": "2587d77466de7023",
        "TorchDevice.mlp": "f433c13a89b92710",
        "TorchDevice.opt_input_embed": "afffb6f3481528a8",
        "TorchDevice.opt_output_embed": "1541079afc3e7b78",
        "TorchDevice.init_cache_one_gpu_batch": "c57b236767ac9a22",
        "TorchDisk.__init__": "94bb388d02e86dcf",
        "TorchDisk.allocate": "41ffece56409b894",
        "TorchDisk.delete": "d87ad19392e53019",
        "TorchDisk.close_copy_threads": "278d993b75472a26",
        "TorchMixedDevice.init_cache_one_gpu_batch": "ee85a39311d43222",
        "general_copy": "9a286403bb10758f",
        "map_to_torch_tensor": "ec2a9e1d3998c3ff",
        "copy_worker_func": "5cf044a8f7f2c1e9",
    },
    "compression.py": {
        "TorchCompressedDevice.allocate": "2ba7bfb16f28f719",
        "TorchCompressedDevice.compress": "e814c0562957edac",
        "TorchCompressedDevice.decompress": "199a6d6d7e510340",
        "general_copy_compressed": "fa3a66ee79f647b3",
        "get_compressed_indices": "d79bf6843f26b99f",
    },
}


def source_hashes(path: Path, wanted: set[str]) -> dict[str, str]:
    """Hashes of the functions `Class.name` or `name` in a Python file."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and prefix + node.name in wanted:
                segment = ast.get_source_segment(text, node) or ""
                found[prefix + node.name] = hashlib.sha256(segment.encode()).hexdigest()[:16]

    visit(ast.parse(text).body, "")
    return found


def changed_functions(package: Path) -> list[str]:
    """What differs from the flexgen this was written for: file:function."""
    changed = []
    for name, expected in FINGERPRINTS.items():
        found = source_hashes(package / name, set(expected))
        changed += [f"{name}:{function}" for function, digest in expected.items() if found.get(function) != digest]
    return changed


def check_package(package: Path) -> None:
    """Raise BackendUnavailable unless the installed flexgen is the one this was written for."""
    changed = changed_functions(package)
    if changed:
        raise BackendUnavailable(
            f"The installed flexgen is not the version this was written for ({', '.join(changed[:3])} differ).",
            hint="Run doctor, or install flexgen again.",
        )
