"""`import vitrify` costs little and pulls in nothing that a user of the primitives does not need."""

import json
import subprocess
import sys

import pytest

import vitrify

REPORT = """
import json, sys
{before}
import vitrify
{after}
import torch
print(json.dumps({{"modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized()}}))
"""


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


def loaded(*, before: str = "", after: str = "") -> dict:
    return json.loads(run(REPORT.format(before=before, after=after)))


USE_THE_PRIMITIVES = """
query = __import__("torch").randn(1, 2, 5, 4)
vitrify.ops.taylor_attention(query, query, query)
vitrify.nn.Attention(8, 2)
"""


def test_the_primitives_load_neither_timm_nor_matplotlib_nor_cuda():
    report = loaded(after=USE_THE_PRIMITIVES)
    heavy = {"timm", "torchvision", "matplotlib", "transformers", "accelerate", "rich", "typer", "yaml"}
    assert heavy & set(report["modules"]) == set()
    assert not report["cuda"]


def test_everything_works_without_triton():
    report = loaded(
        before='sys.modules["triton"] = None',
        after=USE_THE_PRIMITIVES
        + 'model = vitrify.create_model("vit_mini_patch2_28")\nvitrify.convert_(model, vitrify.recipes.vitality())',
    )
    assert "vitrify.convert" in report["modules"]
    assert not report["cuda"]


def test_the_package_itself_loads_no_part_of_it():
    """Not even torch: the public names are looked up when they are used."""
    script = "import sys, vitrify; print([m for m in sys.modules if m.startswith('vitrify') or m == 'torch'])"
    assert run(script).strip() == "['vitrify']"


TIMED = """
import os, sys, time
def spent():
    return sum(os.times()[:2])
import torch
start = spent()
import vitrify
vitrify.ops, vitrify.nn
print(spent() - start)
"""


def test_importing_costs_under_0_3_seconds_more_than_torch():
    """CPU seconds, the least of three, so that a busy machine does not decide."""
    assert min(float(run(TIMED)) for _ in range(3)) < 0.3


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'converts'"):
        vitrify.converts  # noqa: B018
    assert set(vitrify.__all__) <= set(dir(vitrify))
