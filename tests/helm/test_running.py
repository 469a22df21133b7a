"""What the chart renders for the smallest ci file, run: one Ray node with a pod's environment and read-only root.

The container is imitated by a mount namespace in which only `/tmp` can be written; there is no Kubernetes. KubeRay's
part, starting Ray and handing the Serve config to its dashboard, is done by hand with the parameters it would use.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.helm.charts import Document, ci, merged, only, pods, render
from tests.serving import ROOT, free_port, wait_for

TOKEN = "the-token-kuberay-would-make"
START_S = 120
READ_ONLY = """
set -e
mount --rbind / "$ROOM"
mount -o remount,bind,ro "$ROOM"
mount -t tmpfs tmpfs "$ROOM/tmp"
mount -t tmpfs -o mode=755 tmpfs "$ROOM/root"
for folder in "$CHECKOUT" "$PYTHON" "$BASE"; do
    [ -d "$ROOM$folder" ] || mkdir -p "$ROOM$folder"
    mount --bind "$folder" "$ROOM$folder"
    mount -o remount,bind,ro "$ROOM$folder"
done
mount -o remount,ro "$ROOM/root"
kept="$ROOM$CHECKOUT/.expertscale"
[ ! -d "$kept" ] || mount -t tmpfs -o ro,mode=755 tmpfs "$kept"
exec chroot --userspec="$OWNER" "$ROOM" sh -c '
    cd "$0"
    for place in . / /root /etc; do
        if touch "$place/written" 2>/dev/null; then exit 99; fi
    done
    exec "$@"' "$CHECKOUT" "$@"
"""
"""Everything but /tmp read-only. Hidden are what a checkout keeps between starts, and root's home but for the
interpreter, which another user must reach."""


@dataclass(frozen=True)
class Running:
    """documents: as rendered. port: of the API. agent: where probes go, of this node. owner: uid:gid."""

    documents: list[Document]
    port: int
    agent: str
    owner: str

    def probe(self, part: str, name: str) -> int:
        """The HTTP status that a probe of head or worker gets. Like the kubelet it brings no token."""
        group = "head" if part == "head" else "cpu"
        get = pods(only(self.documents, "RayService"))[group]["spec"]["containers"][0][name]["httpGet"]
        base = f"http://127.0.0.1:{self.port}" if get["port"] == "serve" else self.agent
        return status(base + get["path"])


def status(url: str) -> int:
    """The HTTP status of a GET; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _environment(container: Document) -> dict[str, str]:
    """A container's variables, with a made-up key for the one from a Secret."""
    return {variable["name"]: variable.get("value", "a-cluster-key-from-a-secret") for variable in container["env"]}


def _others_may_read() -> bool:
    """Whether the pods' user can read checkout and interpreter; what lies below /tmp and /root is mounted anew."""
    files = (
        ROOT / "deployments" / "app.py",
        Path(sys.prefix) / "pyvenv.cfg",
        Path(sys.base_prefix) / "bin" / "python3",
    )
    folders = {
        parent for file in files for parent in file.parents if parent.parts[:2] not in {("/", "tmp"), ("/", "root")}
    }
    return all(file.stat().st_mode & stat.S_IROTH for file in files) and all(
        folder.stat().st_mode & stat.S_IXOTH for folder in folders
    )


def _namespaces() -> str | None:
    """Why a read-only root cannot be imitated here; None where it can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare`"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return done.stderr.strip() or "mount namespaces are not allowed" if done.returncode else None


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if reason := _namespaces():
        pytest.skip(f"a container cannot be imitated here: {reason}")
    folder = tmp_path_factory.mktemp("pod")
    port, dashboard, agent = free_port(), free_port(), free_port()
    documents = render(merged(ci("minimal-cpu"), {"serve": {"port": port}}))
    service = only(documents, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    container = pods(service)["head"]["spec"]["containers"][0]
    parameters = {
        **cluster["headGroupSpec"]["rayStartParams"],
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": free_port(),
        "metrics-export-port": free_port(),
        "num-cpus": 4,  # the worker's too, since there is one node
    }
    context = pods(service)["head"]["spec"]["securityContext"]
    owner = f"{context['runAsUser']}:{context['runAsGroup']}" if _others_may_read() else "0:0"
    room = folder / "room"
    room.mkdir()
    python = Path(sys.prefix)
    environment = {
        **_environment(container),
        "PATH": os.pathsep.join([str(python / "bin"), "/usr/bin", "/bin", "/usr/sbin", "/sbin"]),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "ROOM": str(room),
        "CHECKOUT": str(ROOT),
        "PYTHON": str(python),
        "BASE": sys.base_prefix,
        "OWNER": owner,
    }
    ray = [str(python / "bin" / "ray"), "start", "--head", "--block", *(f"--{k}={v}" for k, v in parameters.items())]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--fork", "--kill-child", "sh", "-c", READ_ONLY, "sh", *ray],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            return status(f"http://127.0.0.1:{dashboard}/api/gcs_healthz") == 200

        wait_for(answers, START_S, "Ray to start")
        config = json.dumps(yaml.safe_load(service["spec"]["serveConfigV2"])).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{dashboard}/api/serve/applications/",
            data=config,
            method="PUT",
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        yield Running(documents, port, f"http://127.0.0.1:{agent}", owner)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Everything that was started in the namespace, children whose parents have gone too."""
    with suppress(psutil.NoSuchProcess):
        own = psutil.Process(process.pid).children(recursive=True)
        for child in own:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(own, timeout=10)
    process.kill()
    process.wait()


def test_the_model_answers_in_a_pod_of_the_chart(
    running: Running, record_property: Callable[[str, object], None]
) -> None:
    record_property("as user", running.owner)
    url = f"http://127.0.0.1:{running.port}"
    wait_for(lambda: status(f"{url}/health") == 200, START_S, "the model to be ready")
    body = {"model": "expertscale-demo", "prompt": "def main():", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4


def test_every_probe_is_answered_and_the_rest_asks_for_the_token(running: Running) -> None:
    wait_for(lambda: status(f"http://127.0.0.1:{running.port}/-/healthz") == 200, START_S, "Serve's proxy")
    for part in ("head", "worker"):
        for name in ("readinessProbe", "livenessProbe"):
            assert running.probe(part, name) == 200, (part, name)
    assert status(f"{running.agent}/api/serve/applications/") in {401, 403, 404}


def test_the_helm_test_passes_when_the_model_is_ready_and_fails_where_nobody_answers(running: Running) -> None:
    url = f"http://127.0.0.1:{running.port}"
    wait_for(lambda: status(f"{url}/health") == 200, START_S, "the model to be ready")
    container = only(running.documents, "Pod")["spec"]["containers"][0]
    assert container["command"] == ["python", "-c"]
    script, asked = container["args"]
    assert asked == f"http://es-expertscale-serve-svc:{running.port}/health"
    for address, expected in ((f"{url}/health", 0), (f"{url}/nothing-here", 1), ("http://127.0.0.1:1/health", 1)):
        done = subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
