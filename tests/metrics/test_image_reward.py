"""ImageReward agrees with outputs of its authors' code at a small size.

tests/data/image_reward/make.py recorded the outputs.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from hydra.utils import instantiate
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor

from fp4dit.metrics.clip_backbone import make_preprocess
from fp4dit.metrics.image_reward import (
    ImageReward,
    RewardNetwork,
    RewardSizes,
    rename_reward_weights,
)
from fp4dit.utils.errors import UserError

DATA = Path(__file__).parents[1] / "data" / "image_reward"
WEIGHTS, TOKENIZER = DATA / "weights.safetensors", {"path": str(DATA / "tokenizer.json")}
SMALL = RewardSizes(48, 12, 2, 3, words=98, positions=40, text_width=16, text_depth=2, text_heads=2)
CLOSE = {"atol": 1e-5, "rtol": 2e-6}  # sums in another order, of values around 10


@pytest.fixture(scope="module")
def reward_metric() -> ImageReward:
    return ImageReward(str(WEIGHTS), TOKENIZER, SMALL)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(DATA / "answers.safetensors")


@pytest.fixture(scope="module")
def recorded_prompts() -> list[str]:
    with safe_open(DATA / "answers.safetensors", "pt") as file:
        return json.loads(file.metadata()["prompts"])


def pair_all(recorded, recorded_prompts):
    """Return every image with every prompt, and the scores of the authors' code."""
    images = (recorded["images"] / 255).repeat_interleave(len(recorded_prompts), 0)
    return images, recorded_prompts * len(recorded["images"]), recorded["scores"].flatten()


def test_scores_are_those_of_the_authors_code(reward_metric, recorded, recorded_prompts):
    images, asked, scores = pair_all(recorded, recorded_prompts)
    torch.testing.assert_close(reward_metric.score(images, images, asked), scores, **CLOSE)
    assert scores.std() > 0.3  # so that there is something to tell apart


def test_tokens_are_those_of_the_authors_code(reward_metric, recorded, recorded_prompts):
    """Compare with the slow tokenizer: accents, Chinese, an emoji, names of special tokens."""
    read = reward_metric.tokenizer.encode_batch(recorded_prompts)
    assert [text.ids for text in read] == recorded["ids"].tolist()
    assert [text.attention_mask for text in read] == recorded["mask"].tolist()


def test_layer_outputs_are_those_of_the_authors_code(reward_metric, recorded, recorded_prompts):
    vision = reward_metric.model.vision(
        reward_metric.preprocess(recorded["images"] / 255), output_hidden_states=True
    )
    blocks = [*vision.hidden_states[1 : SMALL.depth + 1], vision.last_hidden_state]
    torch.testing.assert_close(torch.stack(blocks), recorded["vision"], **CLOSE)
    attended = recorded["vision"][-1][torch.arange(len(recorded_prompts)) % 3]
    text = reward_metric.model.text(
        recorded["ids"],
        attention_mask=recorded["mask"],
        encoder_hidden_states=attended,
        output_hidden_states=True,
    )
    torch.testing.assert_close(torch.stack(text.hidden_states), recorded["text"], **CLOSE)


def test_scores_do_not_depend_on_batches_or_order(reward_metric, recorded, recorded_prompts):
    images, asked, scores = pair_all(recorded, recorded_prompts)
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))
    reward_metric.reset()
    for part in order.split([1, 4, 13]):
        reward_metric.update(images[part], images[part], [asked[i] for i in part])
    torch.testing.assert_close(reward_metric.compute(), scores[order], **CLOSE)


def test_cut_prompts_are_counted(reward_metric, recorded_prompts):
    assert (
        reward_metric.describe_cut_prompts(recorded_prompts)
        == "reads only the first 35 tokens of 1 of 6 prompts"
    )
    assert reward_metric.describe_cut_prompts(["a " * 33]) == ""
    assert "of 1 of 1 prompts" in reward_metric.describe_cut_prompts(["a " * 34])


def list_published_shapes(s: RewardSizes, patch: int = 16) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a published file, by its name in the authors' code."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def attention(name: str, source: int) -> dict[str, tuple[int, ...]]:
        width = s.text_width
        return {
            **linear(f"{name}.self.query", width, width),
            **linear(f"{name}.self.key", source, width),
            **linear(f"{name}.self.value", source, width),
            **linear(f"{name}.output.dense", width, width),
            **norm(f"{name}.output.LayerNorm", width),
        }

    w, t, vision, text = s.width, s.text_width, "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{vision}.cls_token": (1, 1, w),
        f"{vision}.pos_embed": (1, (s.pixels // patch) ** 2 + 1, w),
        f"{vision}.patch_embed.proj.weight": (w, 3, patch, patch),
        f"{vision}.patch_embed.proj.bias": (w,),
        **norm(f"{vision}.norm", w),
        f"{text}.embeddings.position_ids": (1, s.positions),
        f"{text}.embeddings.word_embeddings.weight": (s.words, t),
        f"{text}.embeddings.position_embeddings.weight": (s.positions, t),
        **norm(f"{text}.embeddings.LayerNorm", t),
        **linear("blip.vision_proj", w, 256),
        **linear("blip.text_proj", t, 256),
    }
    for i in range(s.depth):
        block = f"{vision}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", w) | norm(f"{block}.norm2", w)
        shapes |= linear(f"{block}.attn.qkv", w, 3 * w) | linear(f"{block}.attn.proj", w, w)
        shapes |= linear(f"{block}.mlp.fc1", w, 4 * w) | linear(f"{block}.mlp.fc2", 4 * w, w)
    for i in range(s.text_depth):
        layer = f"{text}.encoder.layer.{i}"
        shapes |= attention(f"{layer}.attention", t) | attention(f"{layer}.crossattention", w)
        shapes |= linear(f"{layer}.intermediate.dense", t, 4 * t)
        shapes |= linear(f"{layer}.output.dense", 4 * t, t) | norm(f"{layer}.output.LayerNorm", t)
    widths = {0: (t, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for i, (inputs, outputs) in widths.items():
        shapes |= linear(f"mlp.layers.{i}", inputs, outputs)
    return shapes


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


def test_the_layout_is_that_of_the_authors_code():
    assert shapes_of(load_file(WEIGHTS)) == list_published_shapes(SMALL)


def test_every_tensor_has_one_place_at_full_size():
    """Every published tensor that is read has one place, and every place a tensor."""
    state, unread = {}, 0
    for name, shape in list_published_shapes(RewardSizes()).items():
        state[name] = torch.empty(shape, device="meta")
        is_projection = name.startswith(("blip.vision_proj", "blip.text_proj"))
        unread += is_projection or name.endswith("position_ids")
    with init_empty_weights():
        expected = RewardNetwork(RewardSizes()).state_dict()
    renamed = rename_reward_weights(state)
    assert len(renamed) == len(state) - unread == len(expected)
    assert shapes_of(renamed) == shapes_of(expected)
    assert len(set(map(id, renamed.values()))) == len(expected)


def test_the_model_has_the_tensors_of_the_file_in_fp32(reward_metric):
    state = load_file(WEIGHTS)
    assert {value.dtype for value in reward_metric.model.state_dict().values()} == {torch.float32}
    assert torch.equal(reward_metric.model.head[7].weight, state["mlp.layers.7.weight"].float())
    assert not any(
        value.is_meta
        for value in [*reward_metric.model.parameters(), *reward_metric.model.buffers()]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, r"not a checkpoint of RewardNetwork: it lacks .* \(96 in all\)$"),
        (
            lambda state: {f"model.{name}": value for name, value in state.items()},
            r"it lacks .* \(96 in all\)$",
        ),
        (
            lambda state: state | {"mlp.layers.9.bias": torch.ones(1)},
            r"it has unknown head\.9\.bias \(1 in all\)$",
        ),
        (
            lambda state: state | {"mlp.layers.7.bias": torch.ones(2)},
            r"another shape of head\.7\.bias \(1 in all\)$",
        ),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    save_file(change(load_file(WEIGHTS)), path)
    with pytest.raises(UserError, match=message):
        ImageReward(str(path), TOKENIZER, SMALL)


@pytest.mark.parametrize("content", [[torch.ones(1)], {0: torch.ones(1)}])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of Reward"):
        ImageReward(str(tmp_path / "other.pt"), TOKENIZER, SMALL)


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="has 96 words where ImageReward's has 30522"):
        ImageReward(str(WEIGHTS), TOKENIZER, RewardSizes(48, 12, 2, 3, 30524, 40, 16, 2, 2))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(UserError, match=r"vocab\.txt is not a tokenizer\.json"):
        ImageReward(str(WEIGHTS), {"path": str(tmp_path / "vocab.txt")}, SMALL)


def test_preprocessing_is_that_of_pil_up_to_its_rounding():
    """Compare with PIL's bicubic filter in 8 bits, in levels of 255."""
    random = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 9, 12, generator=random), (300, 400), mode="bicubic"
    )
    edges = (
        (torch.rand(1, 3, 15, 20, generator=random) > 0.5)
        .float()
        .repeat_interleave(20, 2)
        .repeat_interleave(20, 3)
    )
    for image, most in ((smooth.clamp(0, 1), 1.5), (edges, 16)):
        picture = to_pil_image(image[0])
        resized = picture.resize((224 * 400 // 300, 224), Image.Resampling.BICUBIC)
        left = round((resized.width - 224) / 2)
        expected = normalize(
            to_tensor(resized.crop((left, 0, left + 224, 224))),
            OPENAI_DATASET_MEAN,
            OPENAI_DATASET_STD,
        )
        off = (
            255
            * torch.tensor(OPENAI_DATASET_STD)[:, None, None]
            * (make_preprocess(PreprocessCfg(224))(to_tensor(picture)[None])[0] - expected)
        )
        assert off.abs().mean() < 0.3
        assert off.abs().max() < most


def test_the_config_makes_the_metric(composed, recorded, recorded_prompts):
    cfg = composed(
        "metrics=image_reward",
        f"metrics.image_reward.path={WEIGHTS}",
        f"metrics.image_reward.tokenizer.path={TOKENIZER['path']}",
    )
    reward_metric = instantiate(cfg.metrics, _convert_="all")["image_reward"](sizes=SMALL)
    images, asked, scores = pair_all(recorded, recorded_prompts)
    torch.testing.assert_close(reward_metric.score(images, images, asked), scores, **CLOSE)
