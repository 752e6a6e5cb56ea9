"""Weights are found in the caches of torch.hub and the Hub, and missing ones are named early."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import pipelines.fetch
from fp4dit.utils import hub
from fp4dit.utils.errors import UserError
from pipelines.cli.main import run_command
from tests.conftest import TOY, Run

CLIP = "hf-hub:timm/vit_base_patch32_clip_224.openai"
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of torch.hub and Hugging Face."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which returns its exit code, its output and its errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["fetch", *arguments])
        try:
            run_command(pipelines.fetch.main)
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return call


def on_the_hub(caches: Path, repository: str, *names: str) -> Path:
    """Make files in the layout of the cache of huggingface_hub."""
    home = caches / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(name)
    return snapshot


def test_weights_are_found_in_the_caches_of_their_owners(caches: Path):
    folder = on_the_hub(
        caches,
        CLIP.removeprefix(hub.HUB),
        "open_clip_config.json",
        "open_clip_model.safetensors",
    )
    file = on_the_hub(caches, "xswu/HPSv2", "HPS_v2_compressed.pt") / "HPS_v2_compressed.pt"
    assert hub.find_weights(CLIP) == folder
    assert hub.find_weights("hf-hub:xswu/HPSv2/HPS_v2_compressed.pt") == file
    assert hub.find_weights("hf-hub:xswu/HPSv2/HPS_v2.1_compressed.pt") is None
    assert hub.find_weights(ALEXNET) is None
    place = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    place.parent.mkdir(parents=True)
    place.write_text("weights")
    assert hub.find_weights(ALEXNET) == place


def test_a_folder_of_the_hub_without_weights_is_not_there(caches: Path):
    on_the_hub(caches, CLIP.removeprefix(hub.HUB), "open_clip_config.json")
    assert hub.find_weights(CLIP) is None


def test_missing_weights_stop_a_run_before_its_first_stage(run: Run, capfd, caches: Path):
    assert run("metrics=[psnr,clip_b32]") == 1
    error = capfd.readouterr().err
    source = "timm/vit_base_patch32_clip_224.openai of huggingface.co"
    assert f"metrics=clip_b32: {source} belongs in {caches}/hub" in error
    assert "To get it: python -m pipelines.fetch metrics=clip_b32" in error
    assert "Traceback" not in error
    assert [path for path in (caches / "store").glob("*") if path.is_dir()] == []


def test_a_metric_names_its_missing_weights():
    from fp4dit.metrics.clip import CLIPScore

    with pytest.raises(
        UserError, match=r"timm/vit_base_patch32_clip_224\.openai of huggingface\.co belongs in"
    ):
        CLIPScore(CLIP)


def test_fetch_lists_locations_and_continues_after_a_failure(fetch, caches: Path):
    """Fetching prints where weights lie, and continues after one could not be fetched."""
    own = caches / "alexnet.pth"
    own.write_text("weights")
    given = ["metrics=[clip_b32,clip_image,shapes,lpips]", f"metrics.lpips.path={own}"]
    code, out, err = fetch(*given)
    assert code == 1
    assert f"error: 1 of 3 could not be fetched: {CLIP}" in err
    assert "Traceback" not in err
    assert f"clip_b32, clip_image: {CLIP}\n  {CLIP} cannot be fetched: " in out
    assert "worlds/shapes/weights/clip\n" in out
    assert f"lpips: {own}\n  {own}\n" in out
    on_the_hub(caches, CLIP.removeprefix(hub.HUB), "open_clip_model.safetensors")
    assert fetch(*given)[0] == 0


def test_a_dry_run_only_prints(fetch, caches: Path):
    code, out, _ = fetch("metrics=[lpips,pickscore]", "dry_run=true")
    assert code == 0
    assert (
        f"lpips: {ALEXNET}\n  not here: {ALEXNET} belongs at {caches}/torch/hub/checkpoints/" in out
    )
    assert (
        f"  not here: yuvalkirstain/PickScore_v1 of huggingface.co belongs in {caches}/hub\n" in out
    )
    assert (
        "pickscore: hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K/tokenizer.json\n  not here" in out
    )
    assert not (caches / "torch").exists()


def test_a_failed_download_is_named_and_leaves_nothing(fetch, caches: Path):
    """The error names the file, and no partial file is left."""
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


def test_a_run_prints_once_what_a_preset_lacks(
    run: Run, caches: Path, capfd: pytest.CaptureFixture
):
    assert run(*TOY, "metrics=paper") == 0
    output = capfd.readouterr().out
    assert output.count("not scored") == 1
    assert f"\n  lpips: {ALEXNET} belongs at {caches}/torch/hub/checkpoints/" in output
    assert "\n  fid, sfid, kid, inception_score, precision, recall: https://" in output


def test_a_metric_chosen_by_name_needs_its_weights(
    run: Run, caches: Path, capsys: pytest.CaptureFixture
):
    assert run("metrics=[psnr,lpips]") == 1
    error = capsys.readouterr().err
    assert f"error: metrics=lpips: {ALEXNET} belongs at {caches}" in error
    assert "To get it: python -m pipelines.fetch metrics=lpips" in error
    assert not (caches / "store" / "capture").exists()
