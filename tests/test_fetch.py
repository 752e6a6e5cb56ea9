"""Weights are found where their owners' tools keep them; what is missing is named before anything is made."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import pipelines.fetch
from fp4dit import weights
from fp4dit.errors import UserError
from pipelines.command import command
from tests.conftest import TOY, Run

CLIP = "hf-hub:timm/vit_base_patch32_clip_224.openai"
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: its exit code, what it printed, and its errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["fetch", *arguments])
        try:
            command(pipelines.fetch.main)()
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return call


def on_the_hub(caches: Path, repository: str, *names: str) -> Path:
    """As huggingface_hub lays out what it has downloaded."""
    home = caches / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(name)
    return snapshot


def test_weights_are_found_in_the_caches_of_their_owners(caches: Path):
    folder = on_the_hub(caches, CLIP.removeprefix(weights.HUB), "open_clip_config.json", "open_clip_model.safetensors")
    file = on_the_hub(caches, "xswu/HPSv2", "HPS_v2_compressed.pt") / "HPS_v2_compressed.pt"
    assert weights.find(CLIP) == folder
    assert weights.find("hf-hub:xswu/HPSv2/HPS_v2_compressed.pt") == file
    assert weights.find("hf-hub:xswu/HPSv2/HPS_v2.1_compressed.pt") is None
    assert weights.find(ALEXNET) is None
    place = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    place.parent.mkdir(parents=True)
    place.write_text("weights")
    assert weights.find(ALEXNET) == place


def test_a_folder_of_the_hub_without_weights_is_not_there(caches: Path):
    on_the_hub(caches, CLIP.removeprefix(weights.HUB), "open_clip_config.json")
    assert weights.find(CLIP) is None


def test_what_is_missing_stops_a_run_before_anything_is_made(run: Run, capfd, caches: Path):
    assert run("metrics=[psnr,clip_b32]") == 1
    error = capfd.readouterr().err
    assert f"metrics=clip_b32: timm/vit_base_patch32_clip_224.openai of huggingface.co belongs in {caches}/hub" in error
    assert "To get it: python -m pipelines.fetch metrics=clip_b32" in error
    assert "Traceback" not in error
    assert [path for path in (caches / "store").glob("*") if path.is_dir()] == []


def test_a_metric_that_is_made_names_its_missing_weights():
    from fp4dit.metrics.clip import ClipScore

    with pytest.raises(UserError, match=r"timm/vit_base_patch32_clip_224\.openai of huggingface\.co belongs in"):
        ClipScore(CLIP)


def test_fetch_tells_where_weights_lie_and_goes_on_after_a_failure(fetch, caches: Path):
    own = caches / "alexnet.pth"
    own.write_text("weights")
    given = ["metrics=[clip_b32,clip_image,shapes,lpips]", f"metrics.lpips.path={own}"]
    code, out, err = fetch(*given)
    assert code == 1
    assert f"error: 1 of 3 could not be fetched: {CLIP}" in err
    assert "Traceback" not in err
    assert f"clip_b32, clip_image: {CLIP}\n  {CLIP} cannot be fetched: " in out
    assert "models/shapes/weights/clip\n" in out
    assert f"lpips: {own}\n  {own}\n" in out
    on_the_hub(caches, CLIP.removeprefix(weights.HUB), "open_clip_model.safetensors")
    assert fetch(*given)[0] == 0


def test_a_dry_run_only_tells(fetch, caches: Path):
    code, out, _ = fetch("metrics=[lpips,pickscore]", "dry_run=true")
    assert code == 0
    assert f"lpips: {ALEXNET}\n  not here: {ALEXNET} belongs at {caches}/torch/hub/checkpoints/" in out
    assert f"  not here: yuvalkirstain/PickScore_v1 of huggingface.co belongs in {caches}/hub\n" in out
    assert "pickscore: hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K/tokenizer.json\n  not here" in out
    assert not (caches / "torch").exists()


def test_a_file_that_cannot_be_downloaded_is_named_and_leaves_nothing(fetch, caches: Path):
    spec = "https://localhost:9/network-0123456789ab.pth"  # nobody listens there
    code, out, _ = fetch("metrics=lpips", f"metrics.lpips.path={spec}")
    assert code == 1
    assert f"{spec} cannot be fetched: " in out
    assert [path for path in (caches / "torch").rglob("*") if path.is_file()] == []


def test_metrics_without_weights_need_nothing(fetch):
    assert fetch("metrics=paired")[:2] == (0, "")


def test_help_names_the_metrics(fetch):
    code, out, _ = fetch("--help")
    assert code == 0
    assert "clip_b32, clip_image" in out


def test_a_run_tells_once_what_a_preset_lacks(run: Run, caches: Path, capfd: pytest.CaptureFixture):
    assert run(*TOY, "metrics=paper") == 0
    told = capfd.readouterr().out
    assert told.count("not scored") == 1
    assert f"\n  lpips: {ALEXNET} belongs at {caches}/torch/hub/checkpoints/" in told
    assert "\n  fid, sfid, kid, inception_score, precision, recall: https://" in told


def test_a_metric_asked_for_by_name_has_to_have_its_weights(run: Run, caches: Path, capsys: pytest.CaptureFixture):
    assert run("metrics=[psnr,lpips]") == 1
    told = capsys.readouterr().err
    assert f"error: metrics=lpips: {ALEXNET} belongs at {caches}" in told
    assert "To get it: python -m pipelines.fetch metrics=lpips" in told
    assert not (caches / "store" / "capture").exists()
