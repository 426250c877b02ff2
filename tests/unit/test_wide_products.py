"""16-bit products on a CPU without the instructions: as exact as torch's own, and only where they are meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from loaders.transformers import SPEC
from tests.unit.lab import Lab, run_lab

if TYPE_CHECKING:
    from modules.overlays import Overlays


@pytest.fixture(scope="module")
def lab(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := overlays.unavailable(SPEC):
        pytest.skip(f"Transformers: {reason}")
    with run_lab(overlays, "transformers", "wide_products_lab.py", tmp_path_factory.mktemp("wide")) as ask:
        yield ask


def test_a_product_is_the_exact_one_rounded(lab: Lab) -> None:
    found = lab("products")
    assert len(found) == 6
    for name, error in found.items():
        assert error <= 0.6, name  # half a unit for the rounding, and what float32 sums lose


def test_each_way_to_multiply_goes_through_it(lab: Lab) -> None:
    found = lab("calls")
    assert len(found) == 16
    for name, error in found.items():
        assert error <= 0.6, name


def test_all_else_is_left_alone(lab: Lab) -> None:
    assert lab("untouched") == dict.fromkeys(("float32", "few rows", "a small matrix", "a vector", "a large stack"), True)


def test_models_in_bfloat16_are_as_near_to_float32_as_before(lab: Lab) -> None:
    found = lab("models")
    assert {"llama", "gpt2", "bloom", "gpt_neox", "opt"} <= found.keys()
    for name, errors in found.items():
        assert 0 < errors["wide"] <= 2 * errors["own"], (name, errors)


def test_only_16_bit_models_on_the_cpu_alone(lab: Lab) -> None:
    assert lab("choice") == {"float32": False, "on a GPU": False, "on both": False, "as measured": True}
