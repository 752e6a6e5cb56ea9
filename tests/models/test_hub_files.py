"""Configs of pipelines: where they are read from, and what is said if they are nowhere."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from diffusers import ModelMixin
from huggingface_hub import constants

from fp4dit.models import hub_files
from fp4dit.models.hub_files import (
    INDEX,
    PUBLISHED,
    TRANSFORMER_CONFIG,
    find_config,
    is_reachable,
    read_config,
)
from fp4dit.models.pixart import PixArt
from fp4dit.utils.errors import UserError
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF, list_options, register_resolvers
from pipelines.planning.instantiate import instantiate_node
from tests.conftest import ROOT

ALPHA = "PixArt-alpha/PixArt-XL-2-1024-MS"
MODELS = [option for option in list_options("model") if option not in ("emoji", "generic")]

# Reads a config in a process that does not know that there is no network.
READ = """
import sys
from fp4dit.models.hub_files import read_config
from fp4dit.utils.errors import UserError
try:
    print(read_config(*sys.argv[1:]))
except UserError as error:
    print("error:", error)
"""


def make_source(option: str):
    register_resolvers()
    return instantiate_node("model", compose_config("run", [f"model={option}"]).model)


@pytest.mark.parametrize("option", MODELS)
def test_configs_of_a_configured_model_are_here(option: str):
    """diffusers knows the class of the config, and the pipeline is one of the adapter's."""
    source = make_source(option)
    assert isinstance(source.build_on_meta().transformer, ModelMixin)
    source.check_index(source.find_index())


@pytest.mark.parametrize(("option", "millions"), [("pixart_alpha", 611), ("hunyuan", 1500)])
def test_a_model_has_as_many_parameters_as_its_paper_says(option: str, millions: int):
    transformer = make_source(option).build_on_meta().transformer
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


def test_no_config_is_shipped_that_no_model_needs():
    paths = set()
    for option in MODELS:
        model = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())["model"]
        paths |= {model["path"], model.get("base", model["path"])}
    shipped = {path.parent for path in PUBLISHED.glob(f"*/*/{INDEX}")}
    shipped |= {path.parents[1] for path in PUBLISHED.glob(f"*/*/{TRANSFORMER_CONFIG}")}
    names = {folder.relative_to(PUBLISHED).as_posix() for folder in shipped}
    assert names == {path for path in paths if not path.startswith("pkg://")}


def test_the_cache_of_the_hub_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_config(ALPHA, INDEX) == PUBLISHED / ALPHA / INDEX
    folder = tmp_path / f"models--{ALPHA.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    cached = folder / "snapshots" / "c0ffee" / INDEX
    cached.parent.mkdir(parents=True)
    cached.write_text('{"_class_name": "FluxPipeline"}')
    assert find_config(ALPHA, INDEX) == cached
    assert read_config(ALPHA, INDEX) == {"_class_name": "FluxPipeline"}


@pytest.mark.parametrize("path", ["owner/name", "no hub id", "../published", "/", ""])
def test_what_is_nowhere_is_not_found(path: str):
    assert find_config(path, "none.json") is None


def test_weights_that_are_not_here_get_one_message():
    """Their configs are, so that only the weights need the hub."""
    source = make_source("pixart_alpha")
    source.check(["a fox"])
    with pytest.raises(UserError, match=f"{ALPHA} is not on this machine, and HF_HUB_OFFLINE is"):
        source.load()


@pytest.mark.parametrize(
    ("text", "message"), [(None, "the folder has no transformer/config.json"), ("{", "is not JSON")]
)
def test_a_folder_without_a_config_gets_one_message(tmp_path: Path, text: str | None, message: str):
    (tmp_path / "transformer").mkdir()
    (tmp_path / INDEX).write_text('{"_class_name": "PixArtSigmaPipeline", "transformer": []}')
    if text:
        (tmp_path / TRANSFORMER_CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        PixArt(str(tmp_path)).build_on_meta()


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub does, with one repository."""

    def __init__(self, files: dict[str, bytes], *args) -> None:
        self.files = files
        super().__init__(*args)

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        self.send_response(200 if content else 404)
        if content:
            self.send_header("X-Repo-Commit", "c0ffee")
            self.send_header("ETag", '"1"')
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if content and self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub that has the pipeline `owner/name`."""
    files = {f"/owner/name/resolve/main/{INDEX}": json.dumps({"_class_name": "A"}).encode()}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, files)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def find_free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("owner/name", "{'_class_name': 'A'}"),
        ("owner/other", "error: the model_index.json of owner/other cannot be read from the hub ("),
        ("not a hub id", "error: the model_index.json of not a hub id cannot be read from the hub"),
    ],
)
def test_the_hub_is_asked_for_what_is_not_here(hub: str, tmp_path: Path, path: str, answer: str):
    assert read_in_process(tmp_path, hub, path).startswith(answer)


def test_a_hub_that_cannot_be_reached_gets_one_message(tmp_path: Path):
    endpoint = f"http://127.0.0.1:{find_free_port()}"
    assert read_in_process(tmp_path, endpoint, "owner/name") == (
        f"error: owner/name is not on this machine, and {endpoint} cannot be reached: go online, "
        "or give the folder of a diffusers pipeline\n"
    )


def read_in_process(home: Path, endpoint: str, path: str) -> str:
    """Read the index of a pipeline in another process, and return its output."""
    variables = {name: text for name, text in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", READ, path, INDEX],
        cwd=ROOT,
        env={**variables, "HF_HOME": str(home), "HF_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_server_that_answers_is_reachable(hub: str, monkeypatch: pytest.MonkeyPatch):
    assert is_reachable(hub)  # it answers 404
    assert not is_reachable(f"http://127.0.0.1:{find_free_port()}")
    monkeypatch.setattr(hub_files, "CONNECTION_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not is_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
