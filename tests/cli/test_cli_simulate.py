"""`vitrify simulate`: which model runs where, the tables, the files it writes, and bad input."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import yaml

import vitrify
from vitrify.accelerator.hardware import describe, load
from vitrify.accelerator.masks import synthetic_for
from vitrify.cli import main
from vitrify.cli.on_hardware import takes_recipe

MINI = "vit_mini_patch2_28"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An artefact that nobody converted: one block of the shipped ViT, which takes a quarter of the time."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    vitrify.save(vitrify.create_model(MINI, depth=1), folder)
    return str(folder)


def simulated(arguments, tmp_path):
    """Run the command and return what it wrote."""
    file = tmp_path / "new" / "result.json"
    assert main(["simulate", *map(str, arguments), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def attentions(data):
    return {run["name"]: run["attention"] for run in data["runs"]}


def test_the_tables_say_what_ran_and_what_it_took(tmp_path, capsys):
    data = simulated([MINI, "--compare", "systolic,sanger"], tmp_path)
    captured = capsys.readouterr()
    assert attentions(data) == {
        "vitality": "Taylor, Algorithm 1 (vitality)",
        "systolic": "softmax (original)",
        "sanger": "softmax, sparse (original)",
    }
    for text in (*attentions(data).values(), "speed-up of vitality", "attention step 5", "special exp"):
        assert (text in captured.out) == (text != "special exp")  # the engines shown are vitality's
    assert "note: sanger: masks synthetic" in captured.out
    assert "note: vitality: recalled (believed to be the paper's, never checked against it): clock_mhz" in captured.out
    assert "recipe vitality: 4 changed, 0 kept, 0 refused" in captured.err
    ours, plain, _ = data["runs"]
    assert f"{plain['seconds'] / ours['seconds']:.2f}x" in captured.out
    assert sum(share["array"] + share["waited"] for share in data["shares"].values()) == ours["cycles"]
    assert data["input_shape"] == [1, 1, 28, 28]


def test_the_result_is_that_of_the_library(small, tmp_path):
    data = simulated([small, "--compare", "systolic", "--batch-size", "2"], tmp_path)
    model = vitrify.create_model(MINI, depth=1)
    plain = vitrify.simulate(vitrify.workload(model, (1, 28, 28), 2), "systolic")
    vitrify.convert_(model, vitrify.recipes.vitality())
    ours = vitrify.simulate(vitrify.workload(model, (1, 28, 28), 2, taylor="algorithm1"), "vitality")
    assert [run["cycles"] for run in data["runs"]] == [ours.cycles, plain.cycles]
    assert [run["energy_pj"] for run in data["runs"]] == [ours.energy_pj, plain.energy_pj]


def test_a_converted_artefact_runs_as_it_is_and_its_original_beside_it(small, tmp_path):
    model = vitrify.create_model(MINI, depth=1)
    vitrify.convert_(model, vitrify.Recipe("mine", "taylor", mlp="shift"))
    vitrify.save(model, tmp_path / "linear")
    data = simulated([tmp_path / "linear", "--compare", "vitality-affine,systolic"], tmp_path)
    assert attentions(data) == {
        "vitality": "Taylor, Algorithm 1 (as converted)",
        "vitality-affine": "Taylor, affine (as converted)",
        "systolic": "softmax (original)",
    }
    unconverted = simulated([small, "--hardware", "systolic"], tmp_path)
    assert data["runs"][2]["cycles"] == unconverted["runs"][0]["cycles"]


def test_arrays_that_shift_run_the_recipe_and_another_may_be_asked_for(small, tmp_path):
    data = simulated([small, "--hardware", "shiftadd", "--compare", "vitality"], tmp_path)
    assert attentions(data)["shiftadd"].endswith("(vitrify)")
    assert attentions(data)["vitality"].endswith("(vitality)")
    assert data["runs"][0]["macs"]["shift"] > 0
    data = simulated([small, "--hardware", "shiftadd", "--recipe", "shiftaddvit", "--taylor", "affine"], tmp_path)
    assert attentions(data) == {"shiftadd": "binary codes (shiftaddvit)"}


@pytest.mark.parametrize(
    ("name", "converted"),
    [("vitality", True), ("vitality-affine", True), ("shiftadd", True), ("systolic", False), ("sanger", False)],
)
def test_the_rule_goes_by_schedule_and_primitives(name, converted):
    assert takes_recipe(load(name)) is converted
    assert takes_recipe(replace(load(name), schedule="g-stationary"))


def test_equal_area_and_equal_products(small, tmp_path):
    area = simulated([small, "--compare", "sanger", "--equal", "area"], tmp_path)
    ours, sanger = (sum(run["area_mm2"].values()) for run in area["runs"])
    assert 0.9 * ours < sanger <= ours
    macs = simulated([small, "--compare", "systolic", "--equal", "macs"], tmp_path)
    ours, other = (run["hardware"]["engines"] for run in macs["runs"])
    assert other["array"]["rows"] * other["array"]["columns"] <= 64 * 65


def test_no_pipeline_and_another_schedule_are_the_main_hardwares(small, tmp_path):
    before = simulated([small, "--compare", "vitality-affine"], tmp_path)["runs"]
    after = simulated([small, "--compare", "vitality-affine", "--no-pipeline"], tmp_path)["runs"]
    assert after[0]["cycles"] > before[0]["cycles"]
    assert after[1]["cycles"] == before[1]["cycles"]
    other = simulated([small, "--hardware", "systolic", "--schedule", "vitality"], tmp_path)
    assert attentions(other) == {"systolic": "Taylor, Algorithm 1 (vitality)"}
    sparse = simulated([small, "--hardware", "systolic", "--schedule", "vitcod"], tmp_path)
    assert attentions(sparse) == {"systolic": "softmax, sparse (original)"}


def test_masks_from_a_file(small, tmp_path, capsys):
    masks = synthetic_for(vitrify.workload(vitrify.create_model(MINI, depth=1), (1, 28, 28)), 0.5, seed=3)
    masks.save(tmp_path / "masks.npz")
    given = simulated([small, "--hardware", "sanger", "--masks", tmp_path / "masks.npz"], tmp_path)
    assert "density 0.5, seed 3" in capsys.readouterr().out
    assert given["runs"][0]["cycles"] > simulated([small, "--hardware", "sanger"], tmp_path)["runs"][0]["cycles"]


def test_the_trace_is_in_the_trace_event_format(small, tmp_path):
    """Complete events with what Perfetto needs, one after the other in their row, as long as the run."""
    file = tmp_path / "trace.json"
    data = simulated([small, "--trace", file], tmp_path)["runs"][0]
    trace = json.loads(file.read_text())
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named, ends = {}, defaultdict(float)
    count = 0
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                named[event["tid"]] = event["args"]["name"]
            continue
        count += 1
        assert event["name"]
        assert event["dur"] >= 0
        assert event["ts"] >= ends[event["tid"]] - 1e-9
        ends[event["tid"]] = event["ts"] + event["dur"]
        assert event["args"]["cycles"] == round(event["dur"] * data["hardware"]["clock_mhz"])
    assert set(ends) == set(named)
    assert set(named.values()) == set(data["queues"])
    assert count == sum(queue["jobs"] for queue in data["queues"].values())
    assert max(ends.values()) <= data["seconds"] * 1e6


def test_the_page_is_written_whole(small, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the page needs the extra report")
    file = tmp_path / "page.html"
    assert main(["simulate", small, "--compare", "systolic", "--html", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    page = file.read_text()
    assert f"<title>{small} on vitality</title>" in page
    assert page.endswith("</html>\n")
    assert len(page) < 200_000


def own(tmp_path, **changes):
    """Write a description of one's own and return its path."""
    data = describe(load("vitality"))
    data.update(changes)
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(data))
    return str(file)


def test_hardware_of_ones_own_from_a_file(small, tmp_path):
    file = own(tmp_path, clock_mhz=1000)
    data = simulated([small, "--hardware", file], tmp_path)
    assert data["runs"][0]["name"] == file
    assert data["runs"][0]["hardware"]["clock_mhz"] == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_mini_patch2_82"], f"did you mean '{MINI}'"),
        ([MINI, "--hardware", "vitalty"], "did you mean 'vitality' or 'vitality-affine'"),
        ([MINI, "--hardware", "none.yaml"], "'none.yaml' does not exist"),
        ([MINI, "--compare", "sanger,vitcot"], "did you mean 'vitcod'"),
        ([MINI, "--compare", "sanger", "--equal", "areas"], "did you mean 'area'"),
        ([MINI, "--equal", "area"], "add --compare"),
        ([MINI, "--recipe", "vitalty"], "did you mean 'vitality'"),
        ([MINI, "--hardware", "systolic", "--recipe", "taylor"], "--recipe: systolic runs the original model"),
        ([MINI, "--hardware", "systolic", "--taylor", "affine"], "--taylor: systolic runs the original model"),
        ([MINI, "--taylor", "afine"], "did you mean 'affine'"),
        ([MINI, "--schedule", "vitalty"], "did you mean 'vitality'"),
        ([MINI, "--schedule", "g-stationary"], "cannot keep G in place"),
        ([MINI, "--masks", "masks.npz"], "vitality has no use for them"),
        ([MINI, "--hardware", "sanger", "--masks", "none.npz"], "'none.npz' do not exist"),
        ([MINI, "--batch-size", "0"], "at least 1, not 0"),
        ([MINI, "--img-size", "27"], "27"),
        ([MINI, "--html", "."], "give a file"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments, message, capsys):
    assert main(["simulate", *arguments]) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "Traceback" not in error


def test_a_description_with_a_typo_and_one_without_an_engine(small, tmp_path, capsys):
    data = describe(load("vitality"))
    misspelt = {**data["engines"], "general": {**data["engines"]["general"], "row": 64}}
    assert main(["simulate", small, "--hardware", own(tmp_path, engines=misspelt)]) == 2
    error = capsys.readouterr().err
    assert "row" in error
    assert "general" in error
    engines = {name: engine for name, engine in data["engines"].items() if name != "special"}
    standing = {kind: [p for p in places if "special" not in p] for kind, places in data["standing"].items()}
    assert main(["simulate", small, "--hardware", own(tmp_path, engines=engines, standing=standing)]) == 2
    assert "has no engine that does mul, which op1 (patch_embed.proj.1) needs" in capsys.readouterr().err
