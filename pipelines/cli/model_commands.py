"""Commands on a diffusers pipeline: `fp4dit quantize`, `inspect`, `compare` and the like."""

import csv
import shutil
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4dit.utils.errors import UserError
from pipelines.cli.model_choice import (
    choose_method,
    find_model_overrides,
    find_shared_source,
    find_source,
    load_pipeline,
)
from pipelines.config.resolvers import suggest_names

MODEL_HELP = "folder of a diffusers pipeline, its hub id, or a name of conf/model"
METHOD_HELP = "name that `fp4dit methods` lists, or a YAML file like those of conf/method"
OVERRIDES_HELP = "options of the method, such as weight.granularity.size=64 or rounding.steps=500"
PROMPTS_HELP = "a .txt file with one prompt per line, or a .json, .csv or .tsv file with the field "
PROMPTS_HELP += "`prompt`"


def methods(arguments: Sequence[str]) -> None:
    """Print the list of the methods, or all about some of them."""
    parser = build_parser("methods", "List the methods, with a line about each.")
    parser.add_argument(
        "names",
        metavar="METHOD",
        nargs="*",
        help="print also how it differs from its authors' code",
    )
    names = parser.parse_args(arguments).names
    import fp4dit

    known = fp4dit.methods()
    for name in names:
        if name not in known:
            raise UserError(f"there is no method {name!r}; {suggest_names(name, list(known))}")
        print(known[name])
    if not names:
        print(known)


def targets(arguments: Sequence[str]) -> None:
    """Print which formats of other libraries hold methods exactly, or why they do not."""
    parser = build_parser(
        "targets",
        "Show which files of conf/export_format hold a method exactly, and in which dtype, or why\n"
        "they do not. No weight of a model is read.",
    )
    parser.add_argument("methods", metavar="METHOD", nargs="*", help=f"{METHOD_HELP}; default: all")
    parser.add_argument("overrides", metavar="option=value", nargs="*", help=OVERRIDES_HELP)
    words = parser.parse_intermixed_args(arguments).methods  # both kinds of words
    import fp4dit

    methods = [word for word in words if "=" not in word]
    print(fp4dit.targets(methods or None, [word for word in words if "=" in word]))


def doctor(arguments: Sequence[str]) -> None:
    """Print what is wrong with a checkpoint, and fail if there is something."""
    parser = build_parser(
        "doctor",
        "Find what is wrong with a checkpoint in the format of another library: NaN, missing "
        "tensors,\nscales that are all alike, layers that are not quantized. Beside the original "
        "weights also\ncodes in another order, scales of other blocks, and large errors.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a pipeline or a transformer")
    parser.add_argument("--original", metavar="FOLDER", help="that of the original model")
    options = parser.parse_intermixed_args(arguments)
    from fp4dit.api.targets import list_readers
    from fp4dit.packed.targets.doctor import describe_findings, examine_folder

    findings = examine_folder(options.folder, list_readers(), options.original)
    for line in describe_findings(findings):
        print(line)
    errors = sum(finding.is_error for finding in findings)
    if errors:
        raise UserError(f"{errors} errors were found in {options.folder}")
    print(f"no errors were found in {options.folder}")


def inspect(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `pipelines.inspect` that show what the arguments ask for."""
    parser = build_parser(
        "inspect",
        "Show the number format of each layer and activation, and the size.\n"
        "A sample of the weights, if they are on this machine, tells which 4-bit format is\n"
        "expected to have the least error.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--method", metavar="NAME", default="fp4dit", help=METHOD_HELP)
    parser.add_argument("--all", action="store_true", help="show each block, not equal ones once")
    parser.add_argument("--costs", action="store_true", help="estimate time and memory too")
    parser.add_argument("overrides", metavar="option=value", nargs="*", help=OVERRIDES_HELP)
    options = parser.parse_intermixed_args(arguments)
    overrides = [
        *find_model_overrides(options.model, options.overrides),
        *choose_method(options.method),
    ]
    overrides.append(f"costs={str(options.costs).lower()}")
    overrides.append(f"layers={'all' if options.all else 'merged'}")
    return [*overrides, *options.overrides]


def quantize(arguments: Sequence[str]) -> None:
    """Quantize a pipeline and save it. A command that was killed goes on where it stopped."""
    parser = build_parser(
        "quantize",
        "Quantize a diffusers pipeline, and save it packed. If the command is stopped, the same\n"
        "command goes on where it was.",
    )
    add_pipeline_arguments(parser)
    parser.add_argument("--method", metavar="NAME", required=True, help=METHOD_HELP)
    parser.add_argument(
        "--prompts", metavar="FILE", help=f"prompts to calibrate on: {PROMPTS_HELP}"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--component",
        metavar="NAME",
        action="append",
        help="component to quantize: transformer (the default) or text_encoder; may be repeated",
    )
    options = parser.parse_intermixed_args(arguments)
    check_new_folder(options.out)
    prompts = read_prompts(options.prompts) if options.prompts else None
    overrides = [*find_model_overrides(options.model, options.overrides), *options.overrides]
    source = find_source(options.method, overrides, has_prompts=prompts is not None)
    quantize_and_save(options, source, overrides, prompts)


def quantize_and_save(
    options: Namespace, source: Any, overrides: Sequence[str], prompts: Sequence[str] | None
) -> None:
    """Load a pipeline, quantize and save it, and print a report.

    Args:
        options: The options of the command.
        source: The source of the pipeline.
        overrides: Overrides of the method's config, with those that choose the model.
        prompts: Prompts to calibrate on, if there are any.
    """
    import fp4dit

    out: Path = options.out
    work = out.parent / f".{out.name}.fp4dit"  # keeps the progress
    pipe = load_pipeline(source)
    report = fp4dit.quantize(
        pipe,
        options.method,
        prompts=prompts,
        overrides=overrides,
        components=options.component or ["transformer"],
        work_dir=work,
        **collect_sampling(options),
    )
    pipe.save_pretrained(work / "pipeline")
    (work / "pipeline").replace(out)
    shutil.rmtree(work)
    print(report)
    print(
        f"\nSaved in {out}. To load it:\n"
        "  import fp4dit, torch\n"
        "  from diffusers import DiffusionPipeline\n"
        f"  pipe = DiffusionPipeline.from_pretrained({str(out)!r}, dtype=torch.{source.dtype})"
    )


def compare(arguments: Sequence[str]) -> None:
    """Compare methods on a pipeline, and save the picture and the numbers."""
    parser = build_parser(
        "compare",
        "Draw the same prompts with several methods, and score the images against those of full\n"
        "precision.",
    )
    add_pipeline_arguments(parser)
    parser.add_argument("--methods", metavar="NAME", nargs="+", required=True, help=METHOD_HELP)
    parser.add_argument("--prompts", metavar="FILE", required=True, help=f"prompts: {PROMPTS_HELP}")
    parser.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="other prompts to calibrate on; without them, the second half of --prompts is not "
        "drawn but calibrated on, if a method needs it",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="save a picture and a CSV file")
    options = parser.parse_intermixed_args(arguments)
    prompts, calibration = read_prompts(options.prompts), None
    if options.calibration_prompts:
        calibration = read_prompts(options.calibration_prompts)
    model = find_model_overrides(options.model, options.overrides)
    source = find_shared_source(options.methods, model, options.overrides)
    compare_and_save(options, source, [*model, *options.overrides], prompts, calibration)


def compare_and_save(
    options: Namespace,
    source: Any,
    overrides: Sequence[str],
    prompts: Sequence[str],
    calibration: Sequence[str] | None,
) -> None:
    """Load a pipeline, compare methods on it, print the table, and save it with the picture.

    Args:
        options: The options of the command.
        source: The source of the pipeline.
        overrides: Overrides of the methods' configs, with those that choose the model.
        prompts: Prompts to draw.
        calibration: Prompts to calibrate on, if there are any.
    """
    import fp4dit

    comparison = fp4dit.compare(
        load_pipeline(source),
        options.methods,
        prompts=prompts,
        calibration_prompts=calibration,
        overrides=overrides,
        **collect_sampling(options),
    )
    print(comparison)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        comparison.draw_grid().save(options.out / "comparison.png")
        write_csv(options.out / "comparison.csv", comparison.to_rows())
        print(f"in {options.out}: comparison.csv, comparison.png")


def build_parser(name: str, description: str) -> ArgumentParser:
    """Return a parser of the arguments of a command."""
    return ArgumentParser(
        f"fp4dit {name}", description=description, formatter_class=RawDescriptionHelpFormatter
    )


def add_pipeline_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of all commands that load a pipeline."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument("overrides", metavar="option=value", nargs="*", help=OVERRIDES_HELP)
    parser.add_argument("--steps", metavar="N", type=int, help="denoising steps")
    parser.add_argument("--guidance", metavar="X", type=float, help="guidance scale")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed; default: 0")
    parser.add_argument(
        "--device", metavar="NAME", help="such as cuda:1 or cpu; default: cuda if there is one"
    )


def collect_sampling(options: Namespace) -> dict[str, Any]:
    """Return the arguments that the functions of `fp4dit` have in common."""
    from torch import cuda

    names = ("steps", "guidance", "seed")
    device = options.device or ("cuda" if cuda.is_available() else "cpu")
    return {name: getattr(options, name) for name in names} | {"device": device}


def read_prompts(path: str) -> list[str]:
    """Read a file of prompts.

    Raises:
        UserError: if it cannot be read, or holds none.
    """
    from fp4dit.data.prompts import get_texts, load_prompts
    from fp4dit.data.readers import read_records

    count = len(read_records(path))
    if not count:
        raise UserError(f"{path} holds no prompts")
    return get_texts(load_prompts(count, path))


def check_new_folder(folder: Path) -> None:
    """Raise a UserError if a folder is not empty, or is a file."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already: give a new folder with --out")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with equal keys to a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
