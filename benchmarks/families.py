"""Run tiny random pipelines of all families through all stages, and write a table of what passes.

    nice -n 10 python -m benchmarks.families docs/results/families.md
    python -m benchmarks.families /tmp/page.md --families wan ltx --presets NVFP4

Each cell is a run from the captured calls to an export that diffusers loads. A family captures once
for all presets. Numbers of such pipelines say nothing, and so none is in the table. Results are
kept in outputs/families.json, so that a command that was killed goes on where it was; remove that
file to run all of it again.
"""

import argparse
import os
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write, read_json, write_json
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

PASSES, NOT_RUN = "passes", "not run"

RESULTS = Path("outputs") / "families.json"

Results = Mapping[str, Mapping[str, Any]]

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
    "{run}** combinations that were run pass. None of them was run with published weights, and "
    "they say nothing about the quality of images. No config and no code of ours is for "
    "{strangers}, which `model=generic` takes as they are."
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


def run_family(
    name: str, presets: Sequence[str], finished: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Run a family with the presets that are not finished.

    Yields:
        The class of the family's pipeline, the preset, and its result.
    """
    family = FAMILIES[name]
    if not set(presets) - finished.keys():
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        family.save(folder)
        pipeline = read_json(folder / "model_index.json")["_class_name"]
        for preset in presets:
            if preset not in finished:
                yield pipeline, preset, run_cell(family, folder, Path(place), preset)


def render_page(results: Results, families: Sequence[str], presets: Sequence[str]) -> str:
    """Return the page in Markdown.

    Args:
        results: The class of the pipeline and the results by preset, for each family that was run.
        families: The families of the table.
        presets: The presets of the table.
    """
    notes: dict[str, int] = {}
    lines = [f"| family | pipeline | {' | '.join(presets)} |", "|---|---|" + ":-:|" * len(presets)]
    for name in families:
        found = results.get(name, {"pipeline": "", "results": {}})
        texts = []
        for preset in presets:
            reason = shorten_reason(found["results"].get(preset, NOT_RUN))
            if reason not in (PASSES, NOT_RUN):
                reason = f"[{notes.setdefault(reason, len(notes) + 1)}]"
            texts.append(reason)
        lines.append(f"| `{name}` | {found['pipeline']} | {' | '.join(texts)} |")
    about = [f"- **{name}** is `{' '.join(PRESETS[name])}`" for name in presets]
    explained = "".join(f"{number}. {note}\n" for note, number in notes.items())
    versions = read_package_versions()
    return PAGE.format(
        about=describe_results(results, families, presets),
        table="\n".join(lines),
        presets=";\n".join(about) + ".",
        notes=f"{explained}\n" if notes else "",
        versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers")),
    )


def describe_results(results: Results, families: Sequence[str], presets: Sequence[str]) -> str:
    """Return the first paragraph of the page."""
    cells = []
    for name in families:
        cells += [results[name]["results"].get(preset) for preset in presets if name in results]
    num_run = len(cells) - cells.count(None)
    total = len(families) * len(presets)
    text = ABOUT.format(
        width=WIDTH,
        passed=cells.count(PASSES),
        run=num_run,
        strangers=", ".join(f"`{name}`" for name in STRANGERS),
    )
    if num_run < total:
        text += f" {total - num_run} combinations were not run yet."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


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
    results = read_json(RESULTS) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    for name in options.families:
        finished = dict(results.get(name, {}).get("results", {}))
        for pipeline, preset, result in run_family(name, options.presets, finished):
            print(f"{name:16} {preset:10} {result}", flush=True)
            results.setdefault(name, {"pipeline": pipeline, "results": {}})
            results[name]["results"][preset] = result
            write_json(RESULTS, results)
            page = render_page(results, options.families, options.presets)
            with atomic_write(options.page) as part:
                part.write_text(page)


if __name__ == "__main__":
    main()
