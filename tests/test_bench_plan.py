"""The plan of a training on other machines: what fits here is as it was planned, shares of ranks
are those of drawn sets, and what is sent is that of a count by hand."""

from __future__ import annotations

import json
import math
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gmixout_optim import GMixoutOptimizer, ranks
from gmixout_optim.bench.__main__ import main
from gmixout_optim.bench.bytes import Bytes, bytes_of, resume_file, tensors_in
from gmixout_optim.bench.models import llama_shapes, shapes_of
from gmixout_optim.bench.models.llama import Llama, LlamaConfig, config_of
from gmixout_optim.bench.models.mlp import MLP
from gmixout_optim.bench.plan import Cost, plan
from gmixout_optim.bench.sharding import Sharding, Share
from gmixout_optim.bench.subject import Setting, Subject
from gmixout_optim.bench.traffic import step_traffic
from gmixout_optim.cells import Cells
from gmixout_optim.settings import KEY
from gmixout_optim.shards import local_of
from tests.ranks import needs_gloo, on_ranks
from tests.test_bench import check_refused
from tests.test_shards import piece_on, rank_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planning.md"
ALONE = Sharding.of("fsdp2", 1)

LLAMA = LlamaConfig(width=128, depth=2, heads=4, key_heads=2, hidden=352, vocabulary=2000, tokens=8)
MODELS = {"llama": lambda: Llama(LLAMA), "mlp": lambda: MLP(300_000)}


# Against what is measured, on one rank


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(
    ("granularity", "grad_layout"),
    [(None, None), *product(["element", "column", "row", 16], ["dense", "packed"])],
)
def test_what_fits_here_is_as_it_was_planned(
    model_name: str, dtype: str, granularity, grad_layout
) -> None:
    torch.manual_seed(0)
    subject = Subject("-", "adamw", dtype, "cpu")
    with subject.where_tensors_are_made():
        model = MODELS[model_name]()
        inputs, targets = model.batch(2)
    optimizer = subject.make_base(model.parameters())
    if granularity is not None:
        optimizer = Setting(0.1, granularity, grad_layout).wrap(optimizer, 20)
    model.loss(inputs, targets).backward()
    optimizer.step()

    shapes = [param.shape for param in model.parameters()]
    settings = [] if granularity is None else [(granularity, grad_layout)]
    planned = plan(shapes, subject.dtype, ALONE, 0.1, settings)[-1]
    assert planned.bytes == bytes_of(optimizer)
    assert planned.most == planned.memory
    assert planned.step == step_traffic(optimizer)
    # The file has its own entries for each tensor.
    assert planned.file == planned.file_share
    assert planned.file == pytest.approx(resume_file(optimizer).bytes, rel=0.1)
    entries = [entry.get(KEY, {}) for entry in optimizer.state_dict()["state"].values()]
    copied = [item for entry in entries for item in entry.values() if torch.is_tensor(item)]
    assert planned.saving == sum(item.nbytes for item in copied)
    if granularity is not None:
        cells = sum(member.index().numel() for member in optimizer._members)
        assert planned.drawn == cells


def test_all_of_the_weights_active_is_plain_adamw() -> None:
    plain, ours = plan([torch.Size([64, 64])], torch.float32, ALONE, 1.0, [("row", "packed")])
    assert ours.title == "GMixout, row, packed gradients"
    assert vars(ours) | {"title": plain.title} == vars(plain)


# Ranks


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("granularity", ["element", "column", "row", 16, 6])
@pytest.mark.parametrize("shape", [(30, 48), (7, 64), (96,), (64, 3, 2)])
def test_a_rank_has_its_share_of_the_active_weights(
    shape: tuple[int, ...], granularity, shards: int
) -> None:
    """As FSDP2 cuts, and of drawn sets: the number of active weights on average, and at most."""
    share = Share.of(shape, 0.2, granularity, shards)
    pieces = torch.empty(shape).chunk(shards)
    assert share.weights == pieces[0].numel() == max(piece.numel() for piece in pieces)

    cells = Cells(nn.Parameter(torch.zeros(shape)), 0, granularity, 0.8, "stratified")
    episodes = 300
    counts = []
    for episode in range(episodes):
        mask = cells.mask(cells.draw(seed=0, episode=episode))
        assert mask.sum() == share.packed
        counts.append([int(piece.sum()) for piece in mask.chunk(shards)])
    assert max(map(max, counts)) <= share.most
    first = torch.tensor([count[0] for count in counts], dtype=torch.float64)
    # Four standard errors of the mean, and what rounding to whole weights and cells takes.
    error = 4 * float(first.std()) / episodes**0.5 + 0.5
    assert abs(first.mean() - share.active) <= error


def test_index_sets_take_what_those_of_a_tensor_of_the_ranks_size_would() -> None:
    by_element = Share.of((1000, 1000), 0.1, "element", 4)
    assert (by_element.indices, by_element.drawn) == (4 * 25_000, 25_000)
    few = Share.of((1000, 1000), 0.1, "element", 100)  # 10,000 cells are kept as int64
    assert (few.indices, few.drawn) == (8 * 1000, 1000)
    by_row = Share.of((1000, 1000), 0.1, "row", 4)
    assert (by_row.indices, by_row.drawn, by_row.active) == (8 * 25, 25, 25_000)
    # Each rank keeps all active columns, and a piece of each.
    by_column = Share.of((1000, 800), 0.1, "column", 4)
    assert (by_column.indices, by_column.drawn, by_column.active) == (8 * 5, 5, 250 * 16 * 5)
    by_block = Share.of((24, 50), 0.1, 16, 3)  # 400 weights are 25 blocks
    assert by_block.indices == pytest.approx(8 * by_block.active / 16, abs=4)
    cut = Share.of((24, 50), 0.1, 16, 6)  # 200 are no whole blocks: single elements
    assert cut.indices == pytest.approx(8 * cut.active, abs=4)


def cost_on(sharding: str, ranks: int, dtype: torch.dtype = torch.float32) -> list[Cost]:
    """Of two tensors of 10,000 and 100 weights."""
    shapes = [torch.Size([100, 100]), torch.Size([100])]
    return plan(shapes, dtype, Sharding.of(sharding, ranks), 0.1, [("element", "dense")])


@pytest.mark.parametrize(
    ("sharding", "ranks", "weights", "sent"),
    [
        ("fsdp2", 1, 10_100, 0),
        ("ddp", 1, 10_100, 0),
        # two gathers and a reduce-scatter, to each of the others a rank's share
        ("fsdp2", 2, 5050, 3 * 5050),
        ("fsdp2", 4, 2525, 3 * 3 * 2525),
        # 100 rows on 8 ranks: 13 on the first, and all are padded to it
        ("fsdp2", 8, 13 * 101, 3 * 7 * 13 * 101),
        # a reduce-scatter and a gather of gradients
        ("ddp", 2, 10_100, 2 * 5050),
        ("ddp", 4, 10_100, 2 * 3 * 2525),
        # both: in a group of two, and between its ranks and those of the other one or three
        ("hsdp:2", 4, 5050, 3 * 5050 + 5050),
        ("hsdp:4", 8, 5050, 3 * 5050 + 2 * 3 * 5050 // 4),
        ("hsdp:1", 4, 2525, 3 * 3 * 2525),
        ("hsdp:4", 4, 10_100, 2 * 3 * 2525),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_bytes_are_those_of_a_count_by_hand(
    sharding: str, ranks: int, weights: int, sent: int, dtype: torch.dtype
) -> None:
    plain, ours = cost_on(sharding, ranks, dtype)
    assert plain.bytes.weights == ours.bytes.weights == dtype.itemsize * weights
    assert plain.network == ours.network == dtype.itemsize * sent


CELLS = ["element", "column", "row", 16]
EPISODES = 3


def spread(model: nn.Module, mesh: tuple[int, ...]) -> None:
    """FSDP2, or HSDP on a mesh of (replicas, shards)."""
    devices = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    for module in [*model.layers, model]:
        fully_shard(module, mesh=devices)


def kept_on(rank: int, mesh: tuple[int, ...]) -> list[Bytes]:
    """What a rank keeps after a step: of AdamW, and of GMixout on average over episodes."""
    return [kept_after_steps(mesh, None), *(kept_after_steps(mesh, cells) for cells in CELLS)]


def kept_after_steps(mesh: tuple[int, ...], granularity) -> Bytes:
    torch.manual_seed(0)
    model = Llama(LLAMA)
    spread(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    if granularity is not None:
        optimizer = Setting(0.1, granularity, "packed").wrap(optimizer, 20)
    found = []
    for episode in range(EPISODES if granularity else 1):
        if episode:
            optimizer.resample()
        optimizer.zero_grad()
        model.loss(*model.batch(2)).backward()
        optimizer.step()
        found.append(bytes_of(optimizer))
    parts = ("weights", "gradients", "state", "masters", "anchors", "indices")
    return Bytes(*(sum(getattr(kept, part) for kept in found) // len(found) for part in parts))


@needs_gloo
@pytest.mark.parametrize(
    ("sharding", "mesh"), [("fsdp2", (2,)), ("fsdp2", (3,)), ("hsdp:2", (2, 2))]
)
def test_ranks_keep_what_was_planned(sharding: str, mesh: tuple[int, ...]) -> None:
    ranks = math.prod(mesh)
    shapes = [param.shape for param in Llama(LLAMA).parameters()]
    settings = [(cells, "packed") for cells in CELLS]
    planned = plan(shapes, torch.float32, Sharding.of(sharding, ranks), 0.1, settings)
    found = on_ranks(ranks, kept_on, mesh, limit=120)
    assert found[0][0] == planned[0].bytes
    for rank in found:
        for cost, kept in zip(planned, rank, strict=True):
            assert vars(kept) == pytest.approx(vars(cost.bytes), rel=0.1)
            assert kept.weights + kept.beyond_weights <= cost.most


def saved_by(rank: int, folder: str) -> list[int]:
    """Bytes of a rank's state dicts, which are written to folders."""
    found = []
    for granularity in CELLS:
        model = MLP(WEIGHTS)
        spread(model, (dist.get_world_size(),))
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer = Setting(0.1, granularity, "packed").wrap(optimizer, 20)
        model.loss(*model.batch(2)).backward()
        optimizer.step()
        state = optimizer.state_dict()
        found.append(sum(local_of(item).nbytes for item in tensors_in(state)))
        dcp.save({"optimizer": state}, checkpoint_id=f"{folder}/{granularity}")
    return found


WEIGHTS = 2_000_000


@needs_gloo
def test_files_of_ranks_are_as_they_were_planned(tmp_path: Path) -> None:
    ranks = 3
    shapes = [param.shape for param in MLP(WEIGHTS).parameters()]
    settings = [(cells, "packed") for cells in CELLS]
    planned = plan(shapes, torch.float32, Sharding.of("fsdp2", ranks), 0.1, settings)[1:]
    found = on_ranks(ranks, saved_by, str(tmp_path), limit=120)
    for place, (cost, granularity) in enumerate(zip(planned, CELLS, strict=True)):
        files = list((tmp_path / str(granularity)).iterdir())
        assert sum(path.stat().st_size for path in files) == pytest.approx(cost.file, rel=0.1)
        for rank in found:
            assert rank[place] == pytest.approx(cost.file_share, rel=0.1)


def test_files_of_several_ranks() -> None:
    counts = 4 * 2  # AdamW's step counts
    for sharding, share in [("fsdp2", 2), ("hsdp:4", 2), ("ddp", 1)]:
        ranks = {"fsdp2": 2, "hsdp:4": 8, "ddp": 4}[sharding]
        plain, ours = cost_on(sharding, ranks)
        assert plain.file == 8 * 10_100 + counts
        assert ours.file == 12 * 1010 + counts  # two moments and the anchor
        assert plain.file_share == 8 * 10_100 // share + counts
        assert ours.file_share == 12 * 1010 // share + counts
        assert plain.saving == 0
        if share == 1:
            assert ours.saving == 4 * 1010  # a copy of the anchors


@pytest.mark.parametrize("count", [2, 16, 50])
@pytest.mark.parametrize("granularity", ["element", 16, "row"])
def test_memory_of_saving_is_as_it_was_planned(
    count: int, granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first of so many ranks, which do not communicate."""
    from torch.distributed.tensor import Shard
    from torch.profiler import ProfilerActivity, profile

    for call in ("check_alike", "meet"):
        monkeypatch.setattr(ranks, call, lambda *_: None)
    shape = torch.Size([400, 2000])
    sharding = Sharding.of("fsdp2", count)
    _, planned = plan([shape], torch.float32, sharding, 0.1, [(granularity, "dense")])
    with rank_of([count], 0) as mesh:
        param = torch.nn.Parameter(piece_on(mesh, [Shard(0)], torch.randn(shape)))
        base = torch.optim.AdamW([param])
        optimizer = GMixoutOptimizer(base, mask_prob=0.9, granularity=granularity)
        param.grad = torch.ones_like(param)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            state = optimizer.state_dict()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert state["state"]
    assert planned.saving == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "per_element"),
    [
        # anchor, weight, weight; weight, anchor, two moments
        (torch.float32, 3 * 4 + 4 * 4),
        # anchor, value, weight; weight, anchor, value, two moments
        (torch.bfloat16, 4 + 4 + 2 + 2 + 4 * 4),
    ],
)
def test_redraw_is_that_of_a_count_by_hand(dtype: torch.dtype, per_element: int) -> None:
    plain, ours = cost_on("fsdp2", 1, dtype)
    assert plain.redraw == plain.drawn == 0
    assert ours.drawn == 1010
    assert ours.redraw == per_element * 1010 + 3 * ours.bytes.indices


# Shapes


@pytest.mark.parametrize("weights", [10**8, 10**9, 7 * 10**9, 7 * 10**10, 10**12])
def test_llama_has_about_the_weights_that_were_asked_for(weights: int) -> None:
    config, shapes = config_of(weights), llama_shapes(weights)
    layer = 12 * config.width**2
    assert abs(sum(shape.numel() for shape in shapes) - weights) < 0.52 * layer
    assert 0.6 < config.width / config.depth / 128 < 1.7
    assert config.width == 128 * config.heads == 128 * config.key_heads


def test_llama_of_seven_billion_has_layers_of_llama_2() -> None:
    layer = llama_shapes(7 * 10**9)[1:10]
    assert sorted(layer) == sorted(shapes_of("llama-7b-layer"))


# The command


PLAN = "--plan --params 1e9 --granularity element row --grad-layout packed"


def test_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN.split()) == 0
    text = capsys.readouterr().out
    assert "990,455,808 weights in float32, 164 tensors; 8 ranks, fsdp2; d = 0.1" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 3] * 3
    for lines in tables:
        assert len({len(line) for line in lines}) == len({line.count("|") for line in lines}) == 1
    assert main([*PLAN.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 990_455_808
    assert found["options"]["sharding"] == "fsdp2"
    plain, element, row = found["costs"]
    assert plain["bytes"]["state"] == 8 * 990_455_808 // 8 + 4 * 164
    assert element["bytes"]["indices"] == pytest.approx(0.4 * 990_455_808 / 8, rel=0.01)
    assert row["title"] == "GMixout, row, packed gradients"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--plan", "one of the arguments --params --model is required"),
        ("--plan --params 7e9 --model 1e6", "not allowed with argument"),
        ("--plan --params 1e7", "from 1e+08 to 1e+12, got '1e7'"),
        ("--plan --params many", "got 'many'"),
        ("--plan --params nan", "got 'nan'"),
        ("--plan --params 7e9 --ranks 0", "at least 1, got '0'"),
        ("--plan --params 7e9 --sharding fsdp", "fsdp2, ddp or hsdp:R"),
        ("--plan --params 7e9 --sharding hsdp", "fsdp2, ddp or hsdp:R"),
        ("--plan --params 7e9 --sharding hsdp:-1", "fsdp2, ddp or hsdp:R"),
        ("--plan --params 7e9 --sharding hsdp:0", "8 ranks cannot be divided into 0 replicas"),
        ("--plan --params 7e9 --sharding hsdp:3", "8 ranks cannot be divided into 3 replicas"),
        ("--plan --params 7e9 --sharding ddp --grad-layout packed", "needs dense gradients"),
        ("--plan --params 7e9 --density 0", "density must be a number in (0, 1], got '0'"),
        ("--plan --params 7e9 --granularity columns", "granularity must be 'element'"),
        ("--plan --params 7e9 --dtype int8", "invalid choice: 'int8'"),
        ("--plan --params 7e9 --rounds 3", "unrecognized arguments: --rounds 3"),
        ("--plan --model 1e12", "has 10000000000 cells at granularity='element'"),
        # its name is the beginning of another option's
        ("--plan=h100", "--plan: error: argument --plan: ignored explicit argument 'h100'"),
        ("--plan-gpu h100 --plan", "--plan-gpu: error: unrecognized arguments: --plan"),
        ("--plan --params 7e9 --plan-gpu=tpu", "--plan-gpu: error:"),
        ("--plan-g h100", "unrecognized arguments: --plan-g h100"),
        ("--pla", "unrecognized arguments: --pla"),
    ],
)
def test_bad_options_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(arguments, message, capsys)


def test_help_names_both_plans(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert re.search(r"^  --plan  ", text, re.MULTILINE)
    assert re.search(r"^  --plan-gpu ", text, re.MULTILINE)


def test_tables_of_the_page_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    joined = text.replace("\\\n", " ")
    commands = re.findall(
        r"^\$ python -m gmixout_optim\.bench (--plan --params .*)$", joined, re.MULTILINE
    )
    rows = set()
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0
        rows |= {line for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    assert len(commands) >= 3
    assert {line for line in text.splitlines() if line.startswith("|")} <= rows
