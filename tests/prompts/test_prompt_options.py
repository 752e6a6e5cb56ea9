"""Options of conf/prompts: every set can be planned, and no prompt is calibrated on and drawn."""

import json
import re
from pathlib import Path

import pytest
from hydra.utils import instantiate

import pipelines.inspect
from fp4dit.data.prompts import get_texts
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions
from pipelines.config.resolvers import list_options
from pipelines.planning.checks import check_prompts_disjoint
from pipelines.planning.executor import execute_plan
from pipelines.planning.plan import make_plan
from pipelines.runtime.trainer import Runtime
from tests.conftest import Compose, Run
from tests.helpers.prompt_files import HPS_STYLES, PARTI, make_coco_captions, write_file

SAME_FILE = ["prompts.calibration.path=own.csv", "prompts.evaluation.path=own.csv"]
DISJOINT = [*SAME_FILE, "prompts.calibration.start=4"]

# The groups of the sets that have any.
GROUPS = {
    "hpsv2": set(HPS_STYLES),
    "parti": {"Illustrations", "Animals", "Abstract"},
    "mjhq_30k": {"food", "art"},
}

# The file of each set that has to be downloaded.
FILES = {
    "coco_val2017": "coco/annotations/captions_val2017.json",
    "coco2014": "coco/annotations/captions_val2014.json",
    "hpsv2": "hpsv2/paintings.json",
    "pixart_120": "pixart/samples.txt",
    "parti": "parti/PartiPrompts.tsv",
    "mjhq_30k": "mjhq_30k/meta_data.json",
}


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with tiny files where conf/prompts expects the real ones.

    The splits of COCO have two captions in common.
    """
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    for year in (2014, 2017):
        for split in ("train", "val"):
            content = make_coco_captions(200, 1, f"{split} ")
            content["annotations"][0]["caption"] = "a man riding a wave"
            content["annotations"][1]["caption"] = "a plane"
            write_file(data / f"coco/annotations/captions_{split}{year}.json", content)
    for style in HPS_STYLES:
        write_file(data / f"hpsv2/{style}.json", [f"{style} {i}" for i in range(4)])
    write_file(data / "pixart/samples.txt", "\n".join(f"sample {i}" for i in range(4)))
    write_file(data / "parti/PartiPrompts.tsv", PARTI)
    records = {"ab": {"category": "food", "prompt": "soup"}}
    for i in range(4):
        records[str(i)] = {"category": "art", "prompt": f"art {i}"}
    write_file(data / "mjhq_30k/meta_data.json", records)
    lines = [f"own {i},kind {i % 2}\n" for i in range(200)]
    write_file(tmp_path / "own.csv", "prompt,kind\n" + "".join(lines))
    return tmp_path


@pytest.mark.parametrize("option", list_options("prompts"))
def test_every_set_is_disjoint_from_its_calibration(
    composed: Compose, data_folder: Path, option: str
):
    overrides = DISJOINT if option == "file" else []
    cfg = composed(f"prompts={option}", "prompts.count=4", *overrides)
    steps = make_plan(cfg)
    check_prompts_disjoint(cfg, steps)
    prompts = instantiate(cfg.prompts.evaluation, _convert_="all")(4)
    assert len(prompts) == 4
    assert {prompt.group for prompt in prompts} == GROUPS.get(option, {None})
    assert steps["generate"].instantiate_stage().prompts(4) == prompts
    calibration = steps["capture"].instantiate_stage().calibration.prompt_texts
    assert len(calibration) == 136
    if option != "classes":
        assert not set(calibration) & set(get_texts(prompts))


@pytest.mark.parametrize(
    ("option", "count"),
    [
        ("coco_val2017", 10000),
        ("coco2014", 30000),
        ("hpsv2", 3200),
        ("pixart_120", 120),
        ("parti", 1632),
    ],
)
def test_the_default_is_the_whole_set(composed: Compose, option: str, count: int):
    assert composed(f"prompts={option}").prompts.count == count


def test_every_other_set_needs_no_download():
    assert set(list_options("prompts")) - set(FILES) == {"shapes", "emoji", "classes", "file"}


@pytest.mark.parametrize("option", FILES)
def test_the_error_says_where_to_get_a_missing_file(
    composed: Compose, data_folder: Path, option: str
):
    missing = data_folder / "data" / FILES[option]
    missing.unlink()
    with pytest.raises(UserError) as raised:
        make_plan(composed(f"prompts={option}"))
    message = str(raised.value)
    assert message.startswith(f"there is no file at data/{FILES[option]}. ")
    assert missing.name in message.partition(". ")[2]
    source = r"(\.org|\.co|github\.com/\S+)\b.*: (unpack|put) .*, or give prompts\.\S+=\.\.\."
    assert re.search(source, message)


def test_an_overlap_is_refused_before_the_first_stage(
    run: Run, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = data_folder / "own.csv"
    overrides = [
        "prompts=file",
        f"prompts.calibration.path={path}",
        f"prompts.evaluation.path={path}",
        "prompts.count=3",
        "prompts.evaluation.start=130",
    ]
    assert run(*overrides) == 1
    error = capsys.readouterr().err
    assert "error: 3 of the 136 prompts" in error
    assert "'own 130' and 'own 131'" in error
    assert "prompts.calibration.path=..." in error
    assert "prompts.calibration.start=..." in error
    assert run(*overrides, main=pipelines.inspect.main) == 1
    assert "3 of the 136 prompts" in capsys.readouterr().err
    assert not (tmp_path / "store" / "capture").exists()


def test_an_overlap_can_be_allowed(composed: Compose, data_folder: Path):
    """It is allowed by an option, and always where nothing is calibrated."""
    overlap = [*SAME_FILE, "prompts=file", "prompts.count=3"]
    cfg = composed(*overlap, "method=fp16")
    check_prompts_disjoint(cfg, make_plan(cfg))
    allowed = composed(*overlap, "+prompts.disjoint=false")
    check_prompts_disjoint(allowed, make_plan(allowed))
    refused = composed(*overlap)
    with pytest.raises(UserError, match="3 of the 136 prompts"):
        check_prompts_disjoint(refused, make_plan(refused))
    keys, allowed_keys = ({s.key for s in make_plan(c).values()} for c in (refused, allowed))
    assert keys == allowed_keys


@pytest.mark.unchecked
def test_prompt_seed_and_group_do_not_depend_on_batches(
    composed: Compose, data_folder: Path, pixart_folder: Path, tmp_path: Path
):
    overrides = [
        "method=fp16",
        f"model.path={pixart_folder}",
        "generation.steps=1",
        "prompts.count=5",
    ]
    stored = {}
    for option, size in [("hpsv2", 1), ("hpsv2", 2), ("hpsv2", 8), ("shapes", 8)]:
        cfg = composed(*overrides, f"prompts={option}", f"generation.batch_size={size}")
        store = Store(tmp_path / "store")
        folder = execute_plan(make_plan(cfg), ["reference"], store, Runtime())["reference"]
        stored[option, size] = (folder / "images.json").read_text()
    expected = []
    for i, style in enumerate([*HPS_STYLES, "anime"]):
        expected.append({"prompt": f"{style} {i // 4}", "seed": 42 + i, "group": style})
    for size in (1, 2, 8):
        assert json.loads(stored["hpsv2", size]) == expected
    texts = get_texts(draw_captions(5, ShapesWorld(), held_out=True))
    ungrouped = [{"prompt": text, "seed": 42 + i} for i, text in enumerate(texts)]
    assert stored["shapes", 8] == json.dumps(ungrouped, indent=1)
