"""Run tiny random pipelines of all families through all stages, and write a table of what passes.

    nice -n 10 python -m benchmarks.families docs/results/families.md
    python -m benchmarks.families /tmp/page.md --families wan ltx --presets NVFP4

Each cell is a run from the captured calls to an export that diffusers loads. A family captures once
for all presets. Numbers of such pipelines say nothing, and so none is in the table.
"""

import argparse
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write, read_json
from fp4dit.utils.provenance import read_package_versions
from tests.helpers.small_runs import run_stages
from tests.helpers.strangers import STRANGERS
from tests.helpers.tiny import WIDTH
from tests.helpers.tiny_families import TINY_FAMILIES, TinyFamily

PRESETS: dict[str, tuple[str, ...]] = {
    "W4A8": ("method=fp4dit",),
    "W4A6": ("method=fp4dit", "activation=e2m3_token"),
    "NVFP4": ("method=nvfp4_4over6",),
    "SVDQuant": ("method=svdquant_nvfp4",),
}

# The replicas are 32 channels wide, which groups of 128 do not divide.
NARROW = {"W4A8": ("weight.granularity.size=16",), "W4A6": ("weight.granularity.size=16",)}

# Two prompts of different lengths to calibrate on, another one to measure, and one image.
FEWEST = (
    "calibration.num_prompts=2",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=3",
    "calibration.steps=2",
    "generation.steps=2",
    "prompts.count=1",
)

FEW_STEPS = {
    "W4A8": ("rounding.steps=2",),
    "W4A6": ("rounding.steps=2",),
    "SVDQuant": ("transform.0.steps=2", "transform.1.iterations=2"),
}

FAMILIES = {**TINY_FAMILIES, **STRANGERS}

PASSES = "passes"

PAGE = """\
# Families and presets

{about}

{table}

{presets}

{notes}This page is made by a command, which runs one combination after the other on a CPU:

```sh
nice -n 10 python -m benchmarks.families docs/results/families.md
```

with {versions}.
"""

ABOUT = (
    "Tiny random replicas of the families go through all stages: capture, rounding, scales of "
    "activations, drawing, scoring, and an export that diffusers loads. They have the classes of "
    "the published pipelines, one or two blocks and a width of {width} channels. **{passed} of "
    "{total}** combinations pass. None of them was run with published weights, and they say "
    "nothing about the quality of images. No config and no code of ours is for {strangers}, which "
    "`model=generic` takes as they are."
)


def list_overrides(family: TinyFamily, folder: Path) -> list[str]:
    """Return the overrides that choose a replica; both transformers, if there are two."""
    arguments = [*family.arguments, f"model.path={folder}", "metrics=paired"]
    has_two = (folder / "transformer_2").is_dir()
    if has_two:
        arguments = [x for x in arguments if not x.startswith("model.transformer=")]
        arguments.append("stages=experts")
    return arguments


def run_cell(family: TinyFamily, folder: Path, outputs: Path, preset: str) -> str:
    """Run a family with a preset to its export, and return `PASSES`, or why it does not pass."""
    arguments = [*list_overrides(family, folder), *PRESETS[preset]]
    arguments += [*NARROW.get(preset, ()), *FEW_STEPS.get(preset, ())]
    try:
        paths = run_stages(outputs, *arguments, small=FEWEST, targets=("export",))
        pipe: Any = DiffusionPipeline.from_pretrained(paths["export"] / "pipeline")
        for name, component in pipe.components.items():
            if name.startswith("transformer") and component is not None:
                assert component.config.quantization_config, f"{name} is not quantized"
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:  # the table says what was raised
        return f"{type(error).__name__}: {error}"
    return PASSES


def run_family(name: str, presets: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the class of a family's pipeline, and the result of each preset."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        family.save(folder)
        results = {}
        for preset in presets:
            results[preset] = run_cell(family, folder, Path(place), preset)
            print(f"{name:16} {preset:10} {results[preset]}", flush=True)
        return read_json(folder / "model_index.json")["_class_name"], results


def render_page(results: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """Return the page in Markdown.

    Args:
        results: The class of the pipeline and the result of each preset, for each family.
    """
    presets = list(next(iter(results.values()))[1])
    notes: dict[str, int] = {}
    lines = [f"| family | pipeline | {' | '.join(presets)} |", "|---|---|" + ":-:|" * len(presets)]
    for name, (pipeline, cells) in results.items():
        texts = []
        for preset in presets:
            note = "" if cells[preset] == PASSES else shorten_reason(cells[preset])
            number = notes.setdefault(note, len(notes) + 1) if note else 0
            texts.append(f"[{number}]" if note else PASSES)
        lines.append(f"| `{name}` | {pipeline} | {' | '.join(texts)} |")
    cells = [cell for _, row in results.values() for cell in row.values()]
    about = [f"- **{name}** is `{' '.join(PRESETS[name])}`" for name in presets]
    explained = "".join(f"{number}. {note}\n" for note, number in notes.items())
    versions = read_package_versions()
    about_all = ABOUT.format(
        width=WIDTH,
        passed=cells.count(PASSES),
        total=len(cells),
        strangers=", ".join(f"`{name}`" for name in STRANGERS),
    )
    return PAGE.format(
        about=textwrap.fill(about_all, 120, break_long_words=False, break_on_hyphens=False),
        table="\n".join(lines),
        presets=";\n".join(about) + ".",
        notes=f"{explained}\n" if notes else "",
        versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers")),
    )


def shorten_reason(text: str, limit: int = 300) -> str:
    """Return the first lines of a message as one line, without names of temporary folders."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= limit else f"{line[:limit].rsplit(' ', 1)[0]} ..."


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the file of the page")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = {}
    for name in options.families:
        results[name] = run_family(name, options.presets)
        with atomic_write(options.page) as part:
            part.write_text(render_page(results))


if __name__ == "__main__":
    main()
