"""The console command `fp4dit`. Its help, its version and its list of methods import no torch."""

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

# A line for each command, in the order of the help page.
MODEL_COMMANDS = {
    "quantize": "quantize a diffusers pipeline, and save it packed",
    "inspect": "show what a method does to each layer, without loading a weight",
    "compare": "draw the same prompts with several methods, and score them",
    "methods": "list the methods",
    "targets": "show which formats of other libraries hold a method exactly, or why not",
    "doctor": "find what is wrong with a checkpoint in the format of another library",
}
EXPERIMENT_COMMANDS = {
    "run": "run an experiment: calibrate, round, generate images and score them",
    "table": "print a table of experiments",
    "report": "write a table as one HTML page",
    "store": "list, explain, check, tidy or move results",
    "convert": "convert a packed transformer to the format of another library, or back",
    "fetch": "download the weights of metrics",
    "features": "save the features of real images, for FID and its kind",
    "embed": "embed prompts, so that a run needs no text encoder",
    "pretrain": "train the small models that come with fp4dit",
    "dashboard": "create a W&B workspace for a sweep",
}

HELP = """\
usage: fp4dit COMMAND ...

Quantize diffusion transformers to 4-bit floating point.

On a diffusers pipeline, in a folder or on the Hugging Face hub
{model_commands}

Experiments, whose options have the grammar of Hydra (group=option, -m for a sweep)
{experiment_commands}

fp4dit COMMAND --help describes a command, and fp4dit --version prints the version.
To complete words by TAB in bash:  eval "$(fp4dit run -sc install=bash)"

Examples
  fp4dit inspect pixart_alpha --method nvfp4_4over6
  fp4dit quantize /a/pipeline --method fp4dit --prompts prompts.txt --out /a/new/folder
  fp4dit compare /a/pipeline --methods fp4dit nvfp4_4over6 --prompts prompts.txt
  fp4dit run method=gptq weight=nvfp4
"""


def main() -> None:
    """Run the command that the arguments of the program name."""
    sys.path.append(os.getcwd())  # a method's file may name a class in the current folder
    name, *arguments = sys.argv[1:] or ["--help"]
    if action := ACTIONS.get(name):
        action(arguments)
    elif name in EXPERIMENT_COMMANDS:
        run_experiment_command(name, arguments)
    else:
        sys.exit(f"error: there is no command {name!r}; {suggest_command(name)}")


def print_help(_: Sequence[str]) -> None:
    """Print the help page."""
    pages = {
        "model_commands": format_commands(MODEL_COMMANDS),
        "experiment_commands": format_commands(EXPERIMENT_COMMANDS),
    }
    print(HELP.format(**pages), end="")


def format_commands(commands: Mapping[str, str]) -> str:
    """Return a line for each command."""
    return "\n".join(f"  {name:10} {summary}" for name, summary in commands.items())


def print_version(_: Sequence[str]) -> None:
    """Print the version of the package."""
    import fp4dit

    print(fp4dit.__version__)


def run_model_command(name: str) -> Callable[[Sequence[str]], None]:
    """Return a function that runs a command of `pipelines.cli.model_commands`."""

    def run(arguments: Sequence[str]) -> None:
        from pipelines.cli import model_commands
        from pipelines.cli.main import exit_with_explanation

        with exit_with_explanation():
            overrides = getattr(model_commands, name)(arguments)
        if name == "inspect":
            run_experiment_command(name, overrides)

    return run


def run_experiment_command(name: str, arguments: Sequence[str]) -> None:
    """Run a module of `pipelines` as `python -m` does.

    The module becomes `__main__`, as launchers expect that start other processes.
    """
    if {"-sc", "--shell_completion"} & set(arguments):
        complete_experiment_command(name, arguments)
        return
    sys.argv[1:] = arguments
    runpy.run_module(f"pipelines.{name}", run_name="__main__", alter_sys=True)


def complete_experiment_command(name: str, arguments: Sequence[str]) -> None:
    """Print what Hydra says about the completion of words in a shell."""
    from pipelines.cli.main import run_command

    sys.argv = ["fp4dit", *arguments]  # Hydra installs the completion for this program
    run_command(import_module(f"pipelines.{name}").main)


def complete_words(arguments: Sequence[str]) -> None:
    """Print the words that can complete the line in COMP_LINE, as the shell asks on TAB."""
    program, *words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) > 1 and words[0] in EXPERIMENT_COMMANDS:
        os.environ["COMP_LINE"] = " ".join([program, *words[1:]])
        complete_experiment_command(words[0], ["-sc", *arguments])
    elif len(words) <= 1:
        print(*MODEL_COMMANDS, *EXPERIMENT_COMMANDS)


def suggest_command(name: str) -> str:
    """Return what to say after the name of a command that does not exist."""
    from difflib import get_close_matches

    commands = [*MODEL_COMMANDS, *EXPERIMENT_COMMANDS]
    nearest = get_close_matches(name, commands, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(commands)}"


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "-h": print_help,
    "--help": print_help,
    "help": print_help,
    "--version": print_version,
    "-sc": complete_words,
    **{name: run_model_command(name) for name in MODEL_COMMANDS},
}


if __name__ == "__main__":
    main()
