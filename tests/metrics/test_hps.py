"""HPS agrees with hpsv2's own code, transform and tokenizer on a tiny model."""

import importlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest
import torch

from fp4dit.metrics.hps import HPSv20, HPSv21
from fp4dit.utils.errors import UserError
from tests.helpers.tiny_clip import (
    ARCHITECTURE,
    PROMPTS,
    SIZE,
    convert_to_open_clip,
    draw_pictures,
    make_clip,
)

pytestmark = pytest.mark.filterwarnings("ignore:Importing from timm:FutureWarning")  # by hpsv2


@pytest.fixture(scope="module")
def import_hpsv2(tmp_path_factory):
    """Import the parts of hpsv2 that score.

    The whole package needs others that are not installed, and lacks its vocabulary.
    """
    root = tmp_path_factory.mktemp("hpsv2")
    spec = find_spec("hpsv2")
    assert spec
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0]) / "src" / "open_clip"
    shutil.copytree(
        package, root / "hpsv2_parts", ignore=shutil.ignore_patterns("__init__.py", "__pycache__")
    )
    shutil.copy(
        Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", root / "hpsv2_parts"
    )
    sys.path.insert(0, str(root))
    yield lambda name: importlib.import_module(f"hpsv2_parts.{name}")
    sys.path.remove(str(root))


@pytest.fixture(scope="module")
def hps_checkpoint(tmp_path_factory) -> Path:
    """Save a checkpoint like hpsv2's, with 16-bit weights among other entries."""
    path = tmp_path_factory.mktemp("checkpoint") / "hps.pt"
    weights = convert_to_open_clip(make_clip("gelu"))
    state = {name: value.half() for name, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (64, 64), (48, 96), (90, 60), (50, 33), (21, 20)])
def test_scores_and_images_are_those_of_hpsv2(
    import_hpsv2, hps_checkpoint: Path, shape: tuple[int, int]
):
    images, files = draw_pictures(5, *shape)
    metric = HPSv21(str(hps_checkpoint), ARCHITECTURE)
    prepare = import_hpsv2("transform").image_transform(
        SIZE, is_train=False, resize_longest_max=True
    )
    prepared = torch.stack([prepare(file) for file in files])
    torch.testing.assert_close(metric.backbone.preprocess(images), prepared)
    model = import_hpsv2("model").CLIP(**ARCHITECTURE, output_dict=True).eval()
    model.load_state_dict(torch.load(hps_checkpoint, weights_only=True)["state_dict"])
    with torch.no_grad():
        out = model(prepared, import_hpsv2("tokenizer").tokenize(PROMPTS))
    expected = (out["image_features"] @ out["text_features"].T).diagonal()
    torch.testing.assert_close(
        metric.score(images, images, PROMPTS) / 100, expected, atol=1e-5, rtol=0
    )
    assert expected.std() > 0.01


def test_the_architecture_is_vit_h_14_of_both_packages(import_hpsv2):
    """Compare names and shapes of the weights on the meta device."""
    with torch.device("meta"):
        ours = open_clip.CLIP(**(open_clip.get_model_config("ViT-H-14") or {}))
        theirs = import_hpsv2("model").CLIP(**(open_clip.get_model_config("ViT-H-14") or {}))
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_weights_are_held_once_in_fp32(hps_checkpoint: Path):
    metric = HPSv20(str(hps_checkpoint), ARCHITECTURE)
    assert {p.dtype for p in metric.parameters()} == {torch.float32}
    assert not any(t.is_meta for t in [*metric.parameters(), *metric.buffers()])


def test_about_and_note(hps_checkpoint: Path):
    metric = HPSv21(str(hps_checkpoint), ARCHITECTURE)
    assert metric.about.startswith(f"HPS v2.1, 100 cos, of {hps_checkpoint} in open_clip ")
    assert metric.describe_cut_prompts(PROMPTS) == "1 of 5 prompts were cut at 77 tokens"


def test_a_checkpoint_of_another_model_is_refused(hps_checkpoint: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"hps\.pt is not a checkpoint of CLIP: it lacks .* \(\d+ in all\)"
    ):
        HPSv21(str(hps_checkpoint))  # ViT-H-14
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"other\.pt is not a checkpoint of hpsv2: it has no state_dict"
    ):
        HPSv21(str(tmp_path / "other.pt"), ARCHITECTURE)


def test_a_broken_checkpoint_is_refused(hps_checkpoint: Path, tmp_path: Path):
    (tmp_path / "half.pt").write_bytes(hps_checkpoint.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"half\.pt cannot be read as a checkpoint"):
        HPSv21(str(tmp_path / "half.pt"), ARCHITECTURE)
