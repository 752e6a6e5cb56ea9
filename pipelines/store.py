"""Show, explain, check, tidy or move the results in the store: `python -m pipelines.store ls`."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from fp4dit.store.archive import export_entries, import_entries
from fp4dit.store.entries import StoreEntry
from fp4dit.store.locks import describe_holder
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from fp4dit.utils.formatting import align_columns, format_bytes
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF, suggest_names
from pipelines.results.describe import summarize_entries
from pipelines.results.explain import explain_results
from pipelines.results.gc import collect_garbage
from pipelines.results.select import list_stage_names, select_entries

OVERRIDE = re.compile(r"[+~]{0,2}[\w.@/-]+=")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="store")
def main(cfg: DictConfig) -> None:
    if cfg.do not in ACTIONS:
        raise UserError(f"there is no {cfg.do!r}; {suggest_names(cfg.do, list(ACTIONS))}")
    ACTIONS[cfg.do](cfg, Store(Path(cfg.outputs) / "store", f"store {cfg.do}"))


def list_store(cfg: DictConfig, store: Store) -> None:
    """Print key, size, day, duration and command of each entry, by stage."""
    entries = select_entries(cfg.what, cfg, store)
    for stage in dict.fromkeys(entry.stage for entry in entries):
        members = [entry for entry in entries if entry.stage == stage]
        print(f"{stage}: {len(members)} of {format_size(members)}")
        for line in format_store_entries(members):
            print(f"  {line}")
    print(f"{len(entries)} entries of {format_size(entries)} in {store.root}")


def format_store_entries(entries: Sequence[StoreEntry]) -> list[str]:
    """Return a line for each entry of a stage."""
    summaries = summarize_entries(entries)
    lines = []
    for entry in entries:
        summary = summarize_draft(entry) if entry.is_draft else summaries[entry.key]
        lines.append((entry.key, format_bytes(entry.num_bytes), *summary))
    return align_columns(lines)


def summarize_draft(draft: StoreEntry) -> tuple[str, str, str]:
    """Return what stands in the columns of day, duration and command of a draft."""
    if holder := describe_holder(draft.lock_path):
        return "draft", "", f"being made by {holder}"
    return "draft", "", "of a job that ended early; the next job continues it"


def sum_bytes(entries: Sequence[StoreEntry]) -> int:
    """Return the number of bytes of some entries."""
    return sum(entry.num_bytes for entry in entries)


def format_size(entries: Sequence[StoreEntry]) -> str:
    """Return the size of some entries as text."""
    return format_bytes(sum_bytes(entries)) or "0 MB"


def select_finished(cfg: DictConfig, store: Store) -> list[StoreEntry]:
    """Return the entries that the command names, without drafts."""
    return [entry for entry in select_entries(cfg.what, cfg, store) if not entry.is_draft]


def verify_entries(cfg: DictConfig, store: Store) -> None:
    """Read every file, and print that all are intact.

    Raises:
        UserError: with the names of damaged files.
    """
    entries = select_finished(cfg, store)
    damaged = []
    with make_progress_bar("verify", entries) as bar:
        for entry in entries:
            for name in store.find_damaged_files(entry.path):
                damaged.append(f"{entry.name}/{name}")
            bar.update(entry.num_bytes)
    if damaged:
        lines = [f"{len(damaged)} damaged:", *damaged]
        lines.append("The run that needs one makes it again: give its command.")
        raise UserError("\n".join(lines))
    print(f"{len(entries)} entries of {format_size(entries)} are intact")


def make_progress_bar(label: str, entries: Sequence[StoreEntry]) -> tqdm:
    """Return a progress bar over the bytes of some entries."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=label,
        total=sum_bytes(entries),
        unit="B",
        unit_scale=True,
        mininterval=interval,
        delay=interval,
    )


def export_archive(cfg: DictConfig, store: Store) -> None:
    """Write an archive of the entries that the command names.

    Raises:
        UserError: if there is no path for the archive, or nothing to write.
    """
    entries = select_finished(cfg, store)
    if not cfg.out:
        raise UserError("the archive needs a path. Give out=file.tar")
    if not entries:
        raise UserError(f"there is nothing of that in {store.root}")
    with make_progress_bar("export", entries) as bar:
        export_entries(entries, store, Path(cfg.out), bar.update)
    print(f"{cfg.out}: {len(entries)} entries of {format_size(entries)}")


def import_archives(cfg: DictConfig, store: Store) -> None:
    """Add the entries of archives to the store.

    Raises:
        UserError: if no archive is named, one does not exist, or one is refused.
    """
    if not cfg.what:
        raise UserError("import needs an archive: python -m pipelines.store import file.tar")
    for name in cfg.what:
        if not Path(name).is_file():
            raise UserError(f"there is no file at {name}")
        for entry, is_new in import_entries(Path(name), store, list_stage_names()).items():
            print(f"{entry}  {'added' if is_new else 'was there'}")


ACTIONS: Mapping[str, Callable[[DictConfig, Store], None]] = {
    "ls": list_store,
    "explain": explain_results,
    "verify": verify_entries,
    "gc": collect_garbage,
    "export": export_archive,
    "import": import_archives,
}


def convert_words(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments in the form that Hydra accepts.

    Of the arguments that are neither overrides nor options, the first is the value of `do`, and the
    others are the list `what`.

    >>> list(convert_words(["ls", "capture", "outputs=results"]))
    ['outputs=results', 'do=ls', "what=['capture']"]
    """
    words = []
    for argument in arguments:
        if argument.startswith("-") or OVERRIDE.match(argument):
            yield argument
        else:
            words.append(argument)
    if words:
        yield f"do={words[0]}"
    if words[1:]:
        quoted = [f"'{escape_quotes(word)}'" for word in words[1:]]
        yield f"what=[{','.join(quoted)}]"


def escape_quotes(word: str) -> str:
    """Escape the quotes of a word for Hydra, which leaves a word without quotes as it is."""
    return word.replace("\\", "\\\\").replace("'", "\\'") if "'" in word else word


if __name__ == "__main__":
    sys.argv[1:] = convert_words(sys.argv[1:])
    run_command(main)
