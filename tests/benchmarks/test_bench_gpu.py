"""The benchmark of calibration on a GPU, on a CPU and with tiny models."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import published
from benchmarks.gpu import Scale, main

pytestmark = pytest.mark.unchecked

ASKED = {"prompts": 3, "held_out": 1, "sampler": 2, "steps": 40, "batch": 2}
MEASURED = {
    "chunk": 2,
    "measured_prompts": 1,
    "measured_steps": 4,
    "step": (128, 16, 2),
    "dtype": torch.float32,
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "caption_channels": 64,
}
HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "hidden_size": 128,
    "cross_attention_dim": 128,
    "cross_attention_dim_t5": 64,
    "pooled_projection_dim": 64,
    "mlp_ratio": 4.0,
    "text_len": 7,
    "text_len_t5": 9,
}


def test_report_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for model in ("pixart_alpha_512", "pixart_sigma", "hunyuan"):
        kind, config = published.PUBLISHED[model]
        shrunk = config | (HUNYUAN if "hunyuan" in model else PIXART) | {"sample_size": 8}
        monkeypatch.setitem(published.PUBLISHED, model, (kind, shrunk))
    monkeypatch.setitem(published.AUTOENCODER, "block_out_channels", (32,) * 4)
    monkeypatch.setitem(published.PUBLISHED["pixart_alpha_512"][1], "num_layers", 3)
    main(
        Scale(**ASKED, **MEASURED),
        torch.device("cpu"),
        tmp_path / "gpu.md",
        run=lambda part, *arguments: part(*arguments),
    )
    text = (tmp_path / "gpu.md").read_text()
    rows = {
        cells[1].strip(): cells[2:-1]
        for line in text.splitlines()
        if len(cells := line.split("|")) > 3
    }
    capture, block, total = (
        rows[f"PixArt-alpha 512, {part}"] for part in ("capture", "a block", "capture and 3 blocks")
    )
    assert float(capture[0]) + 3 * float(block[0]) == pytest.approx(float(total[0]), abs=1)
    assert capture[3].strip() == "1 of 2 chunks of 2 prompts"
    assert "of 16 rows, 4 of 40 steps" in block[3]
    assert "2 of 40 blocks" in rows["HunyuanDiT 1024, a block"][3]
    assert all(float(rows[part][0]) > 0 for part in ("plain reference", "scale-aware AdaRound"))
    assert re.search(r"\d% of what 790 TFLOP/s would do, 211 s", text)
