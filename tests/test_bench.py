"""The benchmark command: its models are the real ones, its bytes are counted right, and it says
what it did."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench import training
from gmixout_optim.bench.__main__ import main
from gmixout_optim.bench.bases import BASES, fastest_form
from gmixout_optim.bench.bytes import resume_file
from gmixout_optim.bench.memory import Loop, measure_peaks, peak_bytes
from gmixout_optim.bench.methods import METHODS, why_missing
from gmixout_optim.bench.models import shapes_of
from gmixout_optim.bench.models.convnext import ConvNeXt, ConvNeXtConfig
from gmixout_optim.bench.models.llama import Llama, LlamaConfig, LlamaLayer
from gmixout_optim.bench.models.mlp import MLP
from gmixout_optim.bench.models.resnet import ResNet, ResNetConfig
from gmixout_optim.bench.models.vit import VisionTransformer, ViTConfig
from gmixout_optim.bench.options import read_options
from gmixout_optim.bench.speed import Footprint, Side, Wrapped
from gmixout_optim.bench.subject import Setting, Subject
from gmixout_optim.bench.timing import Spread, Turn, take_turns

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# Four matrices of 1000 x 1000; at d = 0.1 there are 100,000 active elements, or 100 rows, in each.
MATRICES, ELEMENTS, ACTIVE, ROWS = 4, 4_000_000, 400_000, 400


# Models


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("vit_b_16", 86_567_656),
        ("vit_l_14", 304_203_752),
        ("resnet50", 25_557_032),
        ("convnext_t", 28_589_128),
        ("llama-1b", 1_235_814_400),
        ("llama-7b-layer", 202_383_360),
        ("4e6", ELEMENTS),
    ],
)
def test_models_have_as_many_weights_as_they_should(name: str, weights: int) -> None:
    assert sum(shape.numel() for shape in shapes_of(name)) == weights


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
@pytest.mark.parametrize("name", ["vit_b_16", "resnet50", "vit_l_14"])
def test_shapes_are_those_of_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from torchvision import models

    with torch.device("meta"):
        if name == "vit_l_14":
            model = models.VisionTransformer(224, 14, 24, 16, 1024, 4096)
        else:
            model = getattr(models, name)()
    assert shapes_of(name) == [param.shape for param in model.parameters()]


@pytest.mark.parametrize("weights", [100, 101, 20_000, 1_000_000, 10**9, 10**12])
def test_mlp_has_the_weights_that_were_asked_for(weights: int) -> None:
    with torch.device("meta"):
        model = MLP(weights)
    assert abs(sum(param.numel() for param in model.parameters()) - weights) <= model.width / 2
    assert len(model.layers) >= 4


LLAMA = LlamaConfig(width=16, depth=2, heads=4, key_heads=2, hidden=24, vocabulary=50, tokens=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model",
    [
        lambda: VisionTransformer(ViTConfig(4, 16, 2, heads=2, image=8, classes=5)),
        lambda: ResNet(ResNetConfig((1, 1, 1, 1), width=4, image=64, classes=5)),
        lambda: ConvNeXt(ConvNeXtConfig((1, 1), (8, 16), image=32, classes=5)),
        lambda: Llama(LLAMA),
        lambda: LlamaLayer(LLAMA),
        lambda: MLP(1000),
    ],
    ids=["vit", "resnet", "convnext", "llama", "llama-layer", "mlp"],
)
def test_a_small_model_of_each_family_trains(model, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with Subject("-", "adamw", str(dtype).removeprefix("torch."), "cpu").where_tensors_are_made():
        model = model()
        inputs, targets = model.batch(2)
    assert torch.get_default_dtype() == torch.float32
    loss = model.loss(inputs, targets)
    loss.backward()
    assert loss.isfinite()
    for name, param in model.named_parameters():
        assert param.dtype == dtype
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name


def test_llama_looks_back_only_and_sees_the_order() -> None:
    torch.manual_seed(0)
    model = Llama(replace(LLAMA, depth=1))  # deeper ones know the order from what each token sees
    words = torch.tensor([[1, 2, 3, 4, 5, 6]])
    logits = model(words)
    later = model(torch.tensor([[1, 2, 3, 4, 5, 7]]))
    torch.testing.assert_close(logits[:, :5], later[:, :5])
    swapped = model(torch.tensor([[2, 1, 3, 4, 5, 6]]))
    assert not torch.allclose(logits[:, -1], swapped[:, -1])


# Bytes and traffic against hand arithmetic


def footprints(base: str, setting: Setting, dtype: str = "float32") -> tuple[Footprint, Footprint]:
    subject = Subject("4e6", base, dtype, "cpu")
    gradients = [torch.ones(1000, 1000, dtype=subject.dtype) for _ in range(MATRICES)]
    sides = [Side(subject, gradients), Wrapped(subject, gradients, setting)]
    for side in sides:
        side.warm_up()
    return sides[0].footprint(), sides[1].footprint()


STEP = 4  # AdamW's and RMSprop's count of steps, one a tensor

BYTES = [
    # base, dtype, granularity, grad_layout; plain: gradients, state; ours: gradients, state,
    # masters, anchors, indices
    ("adamw", "float32", "element", "dense", (4, 8, STEP), (4, 8, 0, 4, 4, STEP)),
    ("adamw", "float32", "element", "packed", (4, 8, STEP), (0, 8, 0, 4, 4, STEP)),
    ("adamw", "bfloat16", "element", "packed", (2, 4, STEP), (0, 8, 4, 4, 4, STEP)),
    ("adamw", "float32", "row", "packed", (4, 8, STEP), (0, 8, 0, 4, 0, STEP)),
    ("sgd-momentum", "float32", "element", "packed", (4, 4, 0), (0, 4, 0, 4, 4, 0)),
    ("sgd", "float32", "element", "packed", (4, 0, 0), (0, 0, 0, 4, 4, 0)),
]


@pytest.mark.parametrize(("base", "dtype", "granularity", "grad_layout", "plain", "ours"), BYTES)
def test_bytes_are_those_of_a_count_by_hand(
    base: str, dtype: str, granularity, grad_layout, plain: tuple, ours: tuple
) -> None:
    """Bytes per weight on the plain side and per active weight on ours; the last one per tensor."""
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    of_plain, of_ours = (
        footprint.bytes
        for footprint in footprints(base, Setting(0.1, granularity, grad_layout), dtype)
    )
    gradients, state, step = plain
    assert of_plain.weights == of_ours.weights == size * ELEMENTS
    assert of_plain.gradients == gradients * ELEMENTS
    assert of_plain.optimizer == of_plain.state == state * ELEMENTS + step * MATRICES
    assert of_plain.beyond_weights == of_plain.gradients + of_plain.state

    gradients, state, master, anchor, index, step = ours
    rows = 8 * ROWS if granularity == "row" else 0
    assert of_ours.gradients == (gradients * ELEMENTS or size * ACTIVE)
    assert of_ours.state == state * ACTIVE + step * MATRICES
    assert of_ours.masters == master * ACTIVE
    assert of_ours.anchors == anchor * ACTIVE
    assert of_ours.indices == index * ACTIVE + rows
    kept = of_ours.state + of_ours.masters + of_ours.anchors + of_ours.indices
    assert of_ours.optimizer == kept
    assert of_ours.beyond_weights == of_ours.optimizer + of_ours.gradients


@pytest.mark.parametrize(
    ("base", "dtype", "granularity", "plain", "ours"),
    [
        # weights and moments twice, gradient; ours besides the index, and below float32 the weight
        ("adamw", "float32", "element", 8 + 16 + 4, 4 + 4 + 8 + 16),
        ("adamw", "float32", "row", 8 + 16 + 4, 4 + 8 + 16),
        ("adamw", "bfloat16", "element", 4 + 8 + 2, 4 + 2 + 8 + 16 + 2),
        ("sgd", "float32", "element", 8 + 4, 4 + 4 + 8),
        ("rmsprop", "float32", "element", 8 + 8 + 4, 4 + 4 + 8 + 8),
    ],
)
@pytest.mark.parametrize("grad_layout", ["dense", "packed"])
def test_traffic_is_that_of_a_count_by_hand(
    base: str, dtype: str, granularity, plain: int, ours: int, grad_layout
) -> None:
    of_plain, of_ours = footprints(base, Setting(0.1, granularity, grad_layout), dtype)
    assert of_plain.traffic == plain * ELEMENTS
    assert of_ours.traffic == ours * ACTIVE + (8 * ROWS if granularity == "row" else 0)
    assert of_plain.kernels is of_ours.kernels is None  # on a CPU


def test_all_of_the_weights_active_is_the_plain_optimizer() -> None:
    plain, ours = footprints("adamw", Setting(1.0, "element", "packed"))
    assert ours.bytes == plain.bytes
    assert ours.traffic == plain.traffic


def test_resume_file_is_as_large_as_the_one_that_is_saved() -> None:
    model = nn.Linear(300, 100)
    optimizers = [torch.optim.AdamW(model.parameters())]
    optimizers.append(GMixoutOptimizer(torch.optim.AdamW(model.parameters())))
    model(torch.randn(2, 300)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        found = resume_file(optimizer)
        assert found.bytes == len(saved.getvalue())
        assert found.integer_bytes == 0


def test_resume_file_holds_no_index_sets() -> None:
    plain, ours = footprints("adamw", Setting(0.1, "element", "packed"))
    assert ours.resume_file.integer_bytes == plain.resume_file.integer_bytes == 0
    assert plain.resume_file.bytes == pytest.approx(8 * ELEMENTS, rel=0.01)
    assert ours.resume_file.bytes == pytest.approx((8 + 4) * ACTIVE, rel=0.01)


# Times


def test_spread_is_the_median_and_the_range_of_most() -> None:
    assert Spread.of([float(n) for n in range(11, 0, -1)]) == Spread(median=6.0, low=2.0, high=10.0)
    assert Spread.of([3.0, 3.0]) == Spread(3.0, 3.0, 3.0)


def test_calls_take_turns() -> None:
    order: list[str] = []
    turns = [
        Turn(lambda: order.append("a")),
        Turn(lambda: order.append("b"), prepare=lambda: order.append("before b")),
    ]
    samples = take_turns(3, turns, CPU)
    assert [len(times) for times in samples] == [3, 3]
    assert order == ["a", "before b", "b"] * (len(order) // 3)
    assert len(order) // 3 > 3  # the warm-up is not among the samples


@pytest.mark.parametrize("grad_layout", ["dense", "packed"])
@pytest.mark.parametrize("base", BASES)
def test_every_base_can_be_measured(base: str, grad_layout) -> None:
    subject = Subject("2e4", base, "float32", "cpu")
    gradients = [torch.ones(shape) for shape in shapes_of("2e4")]
    ours = Wrapped(subject, gradients, Setting(0.1, 16, grad_layout))
    ours.warm_up()
    assert ours.optimizer.episode == 1
    assert ours.optimizer.report().layout == "packed"
    for param, gradient in zip(ours.params, gradients, strict=True):
        assert param.grad is not None
        assert param.grad is not gradient


def test_the_plain_optimizer_is_in_its_fastest_form() -> None:
    forms = {base: fastest_form(base, torch.float32, CPU) for base in BASES}
    assert {forms[base] for base in ("adamw", "adam", "sgd", "adagrad")} == {"fused"}
    assert {forms[base] for base in ("rmsprop", "adamax", "radam")} == {"foreach"}


# The command


def test_prints_tables() -> None:
    arguments = "--model 2e4 --rounds 2 --threads 1 --granularity element row --no-memory"
    done = subprocess.run(
        [sys.executable, "-m", "gmixout_optim.bench", *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where nobody looks
    title, *tables = done.stdout.split("\n\n")
    assert "AdamW(fused=True)" in title
    assert f"python -m gmixout_optim.bench {arguments}" in title
    rows = [table.splitlines() for table in tables if table.startswith("|")]
    assert [len(lines) - 2 for lines in rows] == [4, 5, 5]  # the plain one has no times of its own
    for lines in rows:
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
    assert "kernels" not in done.stdout
    assert "compiled" not in done.stdout


def test_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--model 2e4 --rounds 2 --threads 1 --density 0.1 0.5 --granularity 16 --grad-layout packed"
    )
    assert main([*arguments.split(), "--resample-every", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == 1
    assert found["weights"] == 20_020
    assert found["options"]["command"].endswith("--json")
    kept = found["speed"]["plain"]["bytes"]
    for density, one in zip([0.1, 0.5], found["speed"]["settings"], strict=True):
        assert one["setting"]["density"] == density
        ours = one["footprint"]["bytes"]
        assert one["optimizer_ratio"] == pytest.approx(ours["optimizer"] / kept["optimizer"])
        assert one["beyond_weights_ratio"] == pytest.approx(
            ours["beyond_weights"] / kept["beyond_weights"]
        )
        step, redraw, packing = (
            one["times"][name]["plain_steps"]["median"] for name in ("step", "redraw", "packing")
        )
        assert one["times"]["all_per_step"] == pytest.approx(step + packing + redraw / 10)
    assert [peak["setting"] and peak["setting"]["density"] for peak in found["peaks"]] == [
        None,
        0.1,
        0.5,
    ]
    for peak in found["peaks"]:
        assert peak["error"] is None
        assert 0 < peak["baseline"] < peak["peak"]
        assert peak["peak_ratio"] == pytest.approx(peak["peak"] / found["peaks"][0]["peak"])


@pytest.mark.gpu
def test_runs_on_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model 4e6 --rounds 2 --granularity element --device cuda --json"
    assert main(arguments.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["device"] == torch.cuda.get_device_name()
    for footprint in [
        found["speed"]["plain"],
        *(one["footprint"] for one in found["speed"]["settings"]),
    ]:
        assert 0 < footprint["kernels"] < 1000
    plain, dense, packed = (peak["peak"] for peak in found["peaks"])
    assert 4 * 4 * ELEMENTS < plain < 2 * 4 * 4 * ELEMENTS
    assert packed < dense < plain


def test_peak_is_that_of_the_training_process_alone() -> None:
    subject = Subject("2e6", "sgd", "float32", "cpu")
    ours = torch.ones(1 << 28)  # 1 GiB
    (peak,) = measure_peaks([Loop(subject, 1, threads=1, setting=None)], lambda title: None)
    assert peak.peak is not None
    assert peak.beyond_baseline is not None
    assert peak.peak < peak_bytes(CPU) - ours.nbytes // 4
    assert peak.beyond_baseline >= 2 * 4 * 2_000_000  # weights and gradients


def test_a_training_loop_that_fails_is_reported() -> None:
    subject = Subject("no model", "adamw", "float32", "cpu")
    (peak,) = measure_peaks([Loop(subject, 1, threads=1, setting=None)], lambda title: None)
    assert peak.error is not None
    assert "no model" in peak.error
    assert peak.peak is peak.peak_ratio is None


def test_training_loops_are_those_of_the_first_granularity() -> None:
    arguments = "--model 2e4 --granularity row 16 --compile --density 0.1 0.2"
    options = read_options(arguments.split())
    assert len(options.settings) == 16
    plain, *others = options.memory_settings
    assert plain is None
    assert [str(setting) for setting in others] == [
        "d=0.1, row, dense gradients",
        "d=0.1, row, packed gradients",
        "d=0.2, row, dense gradients",
        "d=0.2, row, packed gradients",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--density 0", "density must be a number in (0, 1], got '0'"),
        ("--density 0.1 1.5", "got '1.5'"),
        ("--density much", "got 'much'"),
        ("--granularity columns", "granularity must be 'element', 'column', 'row' or a number"),
        ("--granularity 0", "granularity must be at least 1, "),
        ("--model vit", "model must be one of vit_b_16"),
        ("--model 10", "from 100 to 1e+12, got '10'"),
        ("--model 1e13", "from 100 to 1e+12"),
        ("--model 1e12", "choose a smaller model"),
        ("--base lion", "invalid choice: 'lion'"),
        ("--plan-gpu tpu", "invalid choice: 'tpu'"),
        ("--device tpu", "device must be cpu or cuda, got 'tpu'"),
        ("--rounds 1", "at least 2, got '1'"),
        ("--resample-every none", "at least 1, got 'none'"),
        ("--batch-size -1", "--batch-size"),
        ("--no-memory --only-memory", "not allowed with argument"),
    ],
)
def test_bad_options_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(arguments, message, capsys)


def check_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(arguments.split())
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


# Whole training steps


TRAINING = "--training --model 2e4 --rounds 2 --threads 1 --methods AdamW"


def test_training_steps_of_several_methods(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["GMixout, active, column", "GMixout, active, row"]
    assert main([*TRAINING.split(), *methods]) == 0
    text = capsys.readouterr().out
    for method in ("AdamW", *methods):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {method} ")]
        assert re.search(r"\d\.\d\dx \(\d+\.\d\d to \d+\.\d\d\)", row)
    assert "| 12.00 " in text  # gradients and two moments of AdamW
    assert "2e4, 20" in text


@pytest.mark.parametrize("arguments", ["--autocast", "--batch-size 3"])
def test_training_steps_as_json(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAINING.split(), *arguments.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"]["autocast"] == (arguments == "--autocast")
    (outcome,) = found["outcomes"]
    assert outcome["method"] == "AdamW"
    assert outcome["step"]["plain_steps"]["median"] > 0
    assert outcome["above_model"] > 0
    assert 11.9 < outcome["kept"] / 20_000 < 12.1


def test_a_method_that_fails_or_is_missing_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "badam", None)
    assert main([*TRAINING.split(), "BAdam"]) == 0
    assert "BAdam is left out: badam cannot be imported" in capsys.readouterr().out
    case = training.Case("no model", 1, False, False, "cpu", 1)
    (outcome,) = training.measure(replace(case, model="2e4"), ["AdamW"], 2, lambda title: None)
    assert outcome.error is None
    assert training._memory_of(case, "AdamW")[2].startswith("ValueError: model must be one of")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from torchvision_compat import ensure_torchvision

    with contextlib.suppress(ImportError):
        ensure_torchvision()
    if why_missing(method):
        pytest.skip(why_missing(method))
    with training._quiet():
        side = training.Side(training.Case("2e4", 4, False, False, "cpu", 1), method)
        before = [param.detach().clone() for param in side.model.parameters()]
        for _ in range(2):
            side.step()
        side.backward()
        kept = training.kept_bytes(side.model, side.optimizer)
    after = list(side.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(param.isfinite().all() for param in after)
    assert 0 < kept <= 12.1 * 20_000 + 8 * sum(param.numel() for param in after)
