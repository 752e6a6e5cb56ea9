"""ImageReward against what its authors' code answers at a small size, recorded by tests/data/image_reward/make.py."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from hydra.utils import instantiate
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor

from fp4dit.errors import UserError
from fp4dit.metrics.blip import Reward, Sizes, renamed
from fp4dit.metrics.image_reward import CLIP_MEAN, CLIP_STD, ImageReward, preprocessing

DATA = Path(__file__).parent / "data" / "image_reward"
WEIGHTS, TOKENIZER = DATA / "weights.safetensors", {"path": str(DATA / "tokenizer.json")}
SMALL = Sizes(48, 12, 2, 3, words=98, positions=40, text_width=16, text_depth=2, text_heads=2)
CLOSE = {"atol": 1e-5, "rtol": 2e-6}  # sums in another order, of values around 10


@pytest.fixture(scope="module")
def metric() -> ImageReward:
    return ImageReward(str(WEIGHTS), TOKENIZER, SMALL)


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    return load_file(DATA / "answers.safetensors")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with safe_open(DATA / "answers.safetensors", "pt") as file:
        return json.loads(file.metadata()["prompts"])


def pairs(theirs, prompts):
    """Every image with every prompt: images, prompts, and the scores of the authors' code."""
    images = (theirs["images"] / 255).repeat_interleave(len(prompts), 0)
    return images, prompts * len(theirs["images"]), theirs["scores"].flatten()


def test_scores_are_those_of_the_authors_code(metric, theirs, prompts):
    images, asked, scores = pairs(theirs, prompts)
    torch.testing.assert_close(metric.score(images, images, asked), scores, **CLOSE)
    assert scores.std() > 0.3  # so that there is something to tell apart


def test_so_are_the_tokens_that_are_read(metric, theirs, prompts):
    """Theirs are of the slow tokenizer in Python: accents, Chinese, an emoji, its own names of special tokens."""
    read = metric.tokenizer.encode_batch(prompts)
    assert [text.ids for text in read] == theirs["ids"].tolist()
    assert [text.attention_mask for text in read] == theirs["mask"].tolist()


def test_so_is_what_every_layer_answers(metric, theirs, prompts):
    vision = metric.model.vision(metric.preprocess(theirs["images"] / 255), output_hidden_states=True)
    blocks = [*vision.hidden_states[1 : SMALL.depth + 1], vision.last_hidden_state]
    torch.testing.assert_close(torch.stack(blocks), theirs["vision"], **CLOSE)
    attended = theirs["vision"][-1][torch.arange(len(prompts)) % 3]
    text = metric.model.text(
        theirs["ids"], attention_mask=theirs["mask"], encoder_hidden_states=attended, output_hidden_states=True
    )
    torch.testing.assert_close(torch.stack(text.hidden_states), theirs["text"], **CLOSE)


def test_scores_do_not_depend_on_batches_or_order(metric, theirs, prompts):
    images, asked, scores = pairs(theirs, prompts)
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))
    metric.reset()
    for part in order.split([1, 4, 13]):
        metric.update(images[part], images[part], [asked[i] for i in part])
    torch.testing.assert_close(metric.compute(), scores[order], **CLOSE)


def test_a_reader_is_told_of_prompts_that_are_cut(metric, prompts):
    assert metric.note(prompts) == "reads only the first 35 tokens of 1 of 6 prompts"
    assert metric.note(["a " * 33]) == ""
    assert "of 1 of 1 prompts" in metric.note(["a " * 34])


def layout(s: Sizes, patch: int = 16) -> dict[str, tuple[int, ...]]:
    """What a published file holds, as torch names it in the authors' code."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def attention(name: str, source: int) -> dict[str, tuple[int, ...]]:
        w, parts = s.text_width, {"query": s.text_width, "key": source, "value": source}
        self = {k: v for part, width in parts.items() for k, v in linear(f"{name}.self.{part}", width, w).items()}
        return self | linear(f"{name}.output.dense", w, w) | norm(f"{name}.output.LayerNorm", w)

    w, t, eye, read = s.width, s.text_width, "blip.visual_encoder", "blip.text_encoder"
    found = {f"{eye}.cls_token": (1, 1, w), f"{eye}.pos_embed": (1, (s.pixels // patch) ** 2 + 1, w)}
    found |= {f"{eye}.patch_embed.proj.weight": (w, 3, patch, patch), f"{eye}.patch_embed.proj.bias": (w,)}
    for i in range(s.depth):
        block = f"{eye}.blocks.{i}"
        found |= norm(f"{block}.norm1", w) | linear(f"{block}.attn.qkv", w, 3 * w) | linear(f"{block}.attn.proj", w, w)
        found |= norm(f"{block}.norm2", w) | linear(f"{block}.mlp.fc1", w, 4 * w) | linear(f"{block}.mlp.fc2", 4 * w, w)
    found |= norm(f"{eye}.norm", w)
    found[f"{read}.embeddings.position_ids"] = (1, s.positions)
    found |= {f"{read}.embeddings.word_embeddings.weight": (s.words, t)}
    found |= {f"{read}.embeddings.position_embeddings.weight": (s.positions, t)} | norm(
        f"{read}.embeddings.LayerNorm", t
    )
    for i in range(s.text_depth):
        layer = f"{read}.encoder.layer.{i}"
        found |= attention(f"{layer}.attention", t) | attention(f"{layer}.crossattention", w)
        found |= linear(f"{layer}.intermediate.dense", t, 4 * t) | linear(f"{layer}.output.dense", 4 * t, t)
        found |= norm(f"{layer}.output.LayerNorm", t)
    found |= linear("blip.vision_proj", w, 256) | linear("blip.text_proj", t, 256)
    widths = {0: (t, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    return found | {k: v for i, pair in widths.items() for k, v in linear(f"mlp.layers.{i}", *pair).items()}


def test_the_layout_is_that_of_the_authors_code():
    assert {name: tuple(value.shape) for name, value in load_file(WEIGHTS).items()} == layout(SMALL)


def test_at_full_size_every_tensor_has_one_place_and_every_place_a_tensor():
    state = {name: torch.empty(shape, device="meta") for name, shape in layout(Sizes()).items()}
    unread = {name for name in state if name.startswith(("blip.vision_proj", "blip.text_proj"))}
    unread |= {name for name in state if name.endswith("position_ids")}
    with init_empty_weights():
        own = Reward(Sizes()).state_dict()
    given = renamed(state)
    assert len(given) == len(state) - len(unread) == len(own)
    assert {name: value.shape for name, value in given.items()} == {name: value.shape for name, value in own.items()}
    assert len({id(value) for value in given.values()}) == len(own)


def test_the_model_holds_the_tensors_of_the_file_in_fp32(metric):
    state = load_file(WEIGHTS)
    assert {value.dtype for value in metric.model.state_dict().values()} == {torch.float32}
    assert torch.equal(metric.model.head[7].weight, state["mlp.layers.7.weight"].float())
    assert not any(value.is_meta for value in [*metric.model.parameters(), *metric.model.buffers()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, r"no checkpoint of Reward: it lacks .* \(96 in all\)$"),
        (lambda state: {f"model.{name}": value for name, value in state.items()}, r"it lacks .* \(96 in all\)$"),
        (lambda state: state | {"mlp.layers.9.bias": torch.ones(1)}, r"it has unknown head\.9\.bias \(1 in all\)$"),
        (lambda state: state | {"mlp.layers.7.bias": torch.ones(2)}, r"another shape of head\.7\.bias \(1 in all\)$"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    save_file(change(load_file(WEIGHTS)), path)
    with pytest.raises(UserError, match=message):
        ImageReward(str(path), TOKENIZER, SMALL)


@pytest.mark.parametrize("content", [[torch.ones(1)], {0: torch.ones(1)}])
def test_a_file_that_holds_no_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no checkpoint of Reward"):
        ImageReward(str(tmp_path / "other.pt"), TOKENIZER, SMALL)


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="has 96 words where ImageReward's has 30522"):
        ImageReward(str(WEIGHTS), TOKENIZER, Sizes(48, 12, 2, 3, 30524, 40, 16, 2, 2))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(UserError, match=r"vocab\.txt is no tokenizer\.json"):
        ImageReward(str(WEIGHTS), {"path": str(tmp_path / "vocab.txt")}, SMALL)


def test_preprocessing_is_that_of_pil_up_to_its_rounding():
    """PIL's bicubic in 8 bits, as the authors use it; in levels of 255."""
    random = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 12, generator=random), (300, 400), mode="bicubic")
    edges = (torch.rand(1, 3, 15, 20, generator=random) > 0.5).float().repeat_interleave(20, 2).repeat_interleave(20, 3)
    for image, most in ((smooth.clamp(0, 1), 1.5), (edges, 16)):
        picture = to_pil_image(image[0])
        resized = picture.resize((224 * 400 // 300, 224), Image.Resampling.BICUBIC)
        left = round((resized.width - 224) / 2)
        expected = normalize(to_tensor(resized.crop((left, 0, left + 224, 224))), CLIP_MEAN, CLIP_STD)
        off = 255 * torch.tensor(CLIP_STD)[:, None, None] * (preprocessing(224)(to_tensor(picture)[None])[0] - expected)
        assert off.abs().mean() < 0.3
        assert off.abs().max() < most


def test_the_config_makes_it(composed, theirs, prompts):
    cfg = composed(
        "metrics=image_reward",
        f"metrics.image_reward.path={WEIGHTS}",
        f"metrics.image_reward.tokenizer.path={TOKENIZER['path']}",
    )
    metric = instantiate(cfg.metrics, _convert_="all")["image_reward"](sizes=SMALL)
    images, asked, scores = pairs(theirs, prompts)
    torch.testing.assert_close(metric.score(images, images, asked), scores, **CLOSE)
