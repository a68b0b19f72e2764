"""The page of a simulated run: self-contained, with every job in it, and drawn where there is a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

import vitrify
from vitrify.accelerator.hardware import load
from vitrify.cost.explain.groups import Layout
from vitrify.report.breakdown import breakdown, groups_of
from vitrify.report.simulation import Run, attention_of

pytest.importorskip("matplotlib", reason="the page needs the extra report")

from vitrify.report import timeline


@pytest.fixture(scope="module")
def runs():
    with torch.device("meta"):
        model = vitrify.create_model("vit_mini_patch2_28")
    layout = Layout.of(model)
    original = vitrify.workload(model, (1, 28, 28))
    vitrify.convert_(model, vitrify.recipes.vitality())
    graph = vitrify.workload(model, (1, 28, 28), taylor="algorithm1")
    hostile = replace(load("systolic"), title="</script><b>plain</b>")
    made = [
        Run("vitality", attention_of(graph), vitrify.simulate(graph, "vitality")),
        Run("<systolic>", attention_of(original), vitrify.simulate(original, hostile)),
    ]
    return made, breakdown(made[0].result, groups_of(graph, layout))


@pytest.fixture(scope="module")
def source(runs):
    return timeline.page("vit <mini>", "28 x 28 px", *runs, ["a <note>"], "vitrify simulate --html 'a & b'")


def held(source):
    return json.loads(re.search(r'id="timeline-data">(.*?)</script>', source, re.DOTALL)[1])


def test_the_page_asks_for_nothing_from_outside(source):
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?://", source)
    assert "vit &lt;mini&gt;" in source
    assert "&lt;systolic&gt;" in source
    assert "a &lt;note&gt;" in source
    assert "<systolic>" not in source
    assert source.count("</script>") == 2


def test_the_columns_hold_every_job(runs, source):
    result = runs[0][0].result
    data = held(source)
    assert data["cycles"] == result.cycles
    assert [queue["name"] for queue in data["queues"]] == list(runs[1].uses)
    drawn = set()
    for queue in data["queues"]:
        until = operation = 0
        columns = (queue[name] for name in ("gap", "length", "step", "tile", "wait"))
        for gap, length, step, tile, wait in zip(*columns, strict=True):
            assert gap >= 0
            start, until, operation = until + gap, until + gap + length, operation + step
            drawn.add((queue["name"], start, until, operation, data["waits"][wait][0]))
            assert tile < len(data["tiles"])
    meant = {"": "", "operand": "an operand", "dram": "the DRAM"}
    assert drawn == {(job.resource, job.start, job.end, job.operation, meant[job.waits]) for job in result.jobs}
    for job, (group, text) in zip(result.placements, data["operations"], strict=True):
        assert job.operation.id in text
        assert data["groups"][group][0] in runs[1].shares


def test_colours_tell_the_steps_apart(source):
    colours = {name: colour for name, colour in held(source)["groups"] if name.startswith(("attention", "qkv", "MLP"))}
    assert len(set(colours.values())) == len(colours) == 8


def test_bars_show_shares_of_what_they_stand_for(runs):
    parts = timeline._by_part(runs[0][0].result, runs[0][0].result.energy_pj)
    assert sum(parts.values()) == pytest.approx(runs[0][0].result.total_pj)
    assert timeline._by_part(runs[0][0].result, {"dram": 3.0}, dram=False)["DRAM"] == 0
    widths = re.findall(r"width:([\d.]+)%", timeline._uses(runs[0][0].result, runs[1]))
    assert sum(map(float, widths)) == pytest.approx(100 * len(runs[1].uses), abs=0.1)


def test_many_jobs_stay_small(runs, source):
    """About 15 bytes a job: 70,000, as DeiT-Base has, are a megabyte."""
    result = runs[0][0].result
    data = json.dumps(timeline.columns(result, runs[1])["queues"], separators=(",", ":"))
    assert len(data) < 20 * len(result.jobs)


PROBE = """<script>
const wide = document.querySelectorAll(".timeline canvas")[1];
window.requestAnimationFrame = (draw) => draw();
const colours = () => {
  const { data } = wide.getContext("2d").getImageData(0, 0, wide.width, wide.height);
  const seen = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) seen.add(data.slice(i, i + 3).join());
  return seen;
};
const key = (name) => wide.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
key("0");
const whole = [...colours()];
for (let i = 0; i < 9; i++) key("+");
const near = [...colours()];
const box = wide.getBoundingClientRect();
wide.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 400, clientY: box.top + 8 }));
const tip = document.getElementById("timeline-tip").textContent;
document.title = JSON.stringify({ whole, near, tip });
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to draw the page with")
def test_a_browser_draws_the_jobs_and_says_what_they_are(source, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(source.replace("</body>", PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000", "--dump-dom"]
    dom = subprocess.run(["chromium", *options, file.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom.stdout, re.DOTALL)[1])
    colours = dict(held(source)["groups"])
    for name in ("MLP", "qkv", "attention step 2"):
        rgb = ",".join(str(int(colours[name][i : i + 2], 16)) for i in (1, 3, 5))
        assert rgb in seen["whole"], name
    assert len(seen["near"]) < len(seen["whole"])
    assert "general" in seen["tip"]
    assert "cycles" in seen["tip"]
