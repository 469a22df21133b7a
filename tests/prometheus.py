"""Debian's Prometheus: its checker, a server with a data folder of its own, and a reader of Ray's metrics endpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Server, free_port, wait_for

PREFIX = "ray_expertscale_"
RAYS_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "otel_scope_name"}
RAYS_LABELS |= {"otel_scope_version", "otel_scope_schema_url"}
"""On every series, and no business of ours."""
READY_S = 20.0
SESSION_FLAG = "--session-dir="


@dataclass(frozen=True)
class Sample:
    """One line. name: with Ray's prefix, and a histogram's suffix. labels: without those of `RAYS_LABELS`."""

    name: str
    labels: dict[str, str]
    value: float

    def has(self, **labels: str) -> bool:
        """Whether it has these labels, among others."""
        return labels.items() <= self.labels.items()


def program(name: str) -> str:
    """Where it is; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return path


def promtool(*arguments: str, stdin: str = "") -> str:
    """What `promtool ARGUMENTS` says. Raises AssertionError with it where promtool finds fault."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"promtool {' '.join(arguments)}: {said}"
    return said


def session_folder(server: Server) -> Path:
    """Where the server's own Ray keeps its files, from its processes."""
    for pid in server.pids():
        with contextlib.suppress(psutil.Error):
            for word in psutil.Process(pid).cmdline():
                if word.startswith(SESSION_FLAG):
                    return Path(word.removeprefix(SESSION_FLAG))
    raise RuntimeError("no process of the server names its session folder")


def metrics_urls(server: Server) -> list[str]:
    """The metrics endpoint of each node of the server's own Ray."""
    ports = [int(each.read_text()) for each in session_folder(server).glob("metrics_export_port_*")]
    return [f"http://127.0.0.1:{port}/metrics" for port in sorted(ports)]


def discovery_file(server: Server) -> Path:
    """The file that Ray's head writes for Prometheus."""
    return session_folder(server) / "prom_metrics_service_discovery.json"


def scraped(url: str) -> str:
    """What a metrics endpoint says, word for word."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def samples(text: str, prefix: str = PREFIX) -> list[Sample]:
    """The lines whose names begin with `prefix`."""
    return [
        Sample(each.name, {k: v for k, v in each.labels.items() if k not in RAYS_LABELS}, each.value)
        for family in text_string_to_metric_families(text)
        for each in family.samples
        if each.name.startswith(prefix)
    ]


def scrape(url: str, prefix: str = PREFIX) -> list[Sample]:
    """The samples of a metrics endpoint, ours unless said otherwise."""
    return samples(scraped(url), prefix)


def only_ours(text: str) -> str:
    """The part of a metrics endpoint's text that is ours, without Ray's own labels, for `promtool check metrics`."""
    lines = []
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIX):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines += [f"# HELP {name} {family.documentation}", f"# TYPE {name} {family.type}"]
        for each in family.samples:
            kept = {k: v for k, v in each.labels.items() if k not in RAYS_LABELS}
            labels = ",".join(f"{key}={json.dumps(value)}" for key, value in kept.items())
            lines.append(f"{each.name}{{{labels}}} {each.value}")
    return "\n".join(lines) + "\n"


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **arguments: str) -> Any:
        """The `data` of an answer of its HTTP API."""
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: [{"metric": labels, "value": [time, text]}]."""
        return list(self.get("query", query=expression)["result"])


@contextmanager
def prometheus(
    targets: Sequence[str] = (), *, config: Path | None = None, interval_s: float = 1
) -> Iterator[Prometheus]:
    """A server until the block ends, on a free port of loopback, that scrapes `targets` ("host:port").

    config: a file of its own instead. Nothing is left behind.
    """
    path, port = program("prometheus"), free_port()
    with TemporaryDirectory(prefix="xs-prometheus-") as name:
        folder = Path(name)
        if config is None:
            config = folder / "prometheus.yml"
            job = {"job_name": "ray", "static_configs": [{"targets": list(targets)}]}
            times = {"scrape_interval": f"{interval_s:g}s", "evaluation_interval": f"{interval_s:g}s"}
            config.write_text(json.dumps({"global": times, "scrape_configs": [job]}))  # JSON is YAML
        command = [path, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
            )
            try:
                running = Prometheus(f"http://127.0.0.1:{port}")
                wait_for(lambda: _ready(running.url, process, folder / "log"), READY_S, "Prometheus is ready")
                yield running
            finally:
                process.terminate()
                process.wait(20)


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"Prometheus has stopped: {log.read_text()[-2000:]}")
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
