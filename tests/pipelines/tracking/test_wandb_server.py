"""W&B servers that fail: the job logs a warning and ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import ROOT, TOY
from tests.helpers.waiting import PATIENCE
from tests.pipelines.tracking.records import make_view, merge_summary, read_records


class SilentHandler(BaseHTTPRequestHandler):
    """A W&B server that accepts one run, and refuses its contents."""

    server: "Server"

    def do_POST(self) -> None:
        body = (
            json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/graphql"
            else {}
        )
        response: dict[str, Any] = {
            "viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}"}
        }
        response |= {"serverInfo": {"features": []}}
        query = body.get("query", "")
        refused = self.server.has_run and not query.strip().startswith("query")
        if not refused and "upsertBucket" in query:
            self.server.has_run = True
            project = {"id": "p", "name": "fp4dit", "entity": {"id": "e", "name": "me"}}
            bucket: dict[str, Any] = {
                "id": "b",
                "name": body["variables"]["name"],
                "displayName": "x",
                "config": "{}",
            }
            response = {
                "upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}
            }
        text = b"" if refused else json.dumps({"data": response}).encode()
        self.send_response(404 if "otel" in self.path else 503 if refused else 200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None: ...


class Server(ThreadingHTTPServer):
    has_run = False


@pytest.fixture
def server() -> Iterator[Server]:
    silent_server = Server(("127.0.0.1", 0), SilentHandler)
    Thread(target=silent_server.serve_forever, daemon=True).start()
    yield silent_server
    silent_server.shutdown()
    silent_server.server_close()


def test_a_job_does_not_wait_for_a_silent_server(server: Server, tmp_path: Path):
    """The job is a process, because W&B reads the address of its server only once."""
    url = f"http://127.0.0.1:{server.server_port}"
    options = ["logger=wandb", f"outputs={tmp_path}"]
    account = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "WANDB_CONFIG_DIR": str(tmp_path)}

    def run_job(mode: str, seconds: int) -> subprocess.CompletedProcess:
        logger = [f"logger.mode={mode}", f"logger.timeout={seconds}"]
        command = [sys.executable, "-m", "pipelines.run", *TOY, *options, *logger]
        environment = {**os.environ, **account}
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )

    # On a busy machine a job may need more than a second to begin its run on the server.
    for seconds in (1, 10, 100):
        job = run_job("online", seconds)
        if "TimeoutError" in job.stdout + job.stderr:
            break
    assert server.has_run
    assert job.returncode == 0
    assert "W&B does not show all of this job: TimeoutError" in job.stdout + job.stderr
    assert "Traceback" not in job.stderr
    assert list(tmp_path.glob("store/score/*/metrics.json"))
    assert run_job("offline", 100).returncode == 0
    assert "score/psnr" in merge_summary(read_records(tmp_path))  # from the store


def test_an_unreachable_server_is_logged(
    job, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    make_view(tmp_path, mode="online", timeout=3.0).show(*job)
    (record,) = caplog.records
    assert "results are in the store" in record.getMessage()
