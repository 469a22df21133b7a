"""`make serve`: check the config, run `serve run` in the foreground, say when it answers, leave nothing behind.

    python -m deployments.launch CONFIG --port 8000

Knows processes and terminals; what is served is `deployments.app`'s business. `serve run` is started in a session of
its own, so that Ctrl-C reaches it once and in order (Serve first, then Ray), not every process of the cluster at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from cluster.config import AppConfig, SecuritySpec, project_root, resolve
from deployments import config_file

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
DASHBOARD_PORT, DASHBOARD_TRIES = 8265, 50  # Ray's own
POLL_S = 0.25
SERVE_STOP_S = 30.0
LEFTOVER_STOP_S = 5.0


def main(arguments: list[str]) -> int:
    """Run until interrupted; returns the exit status."""
    options = _parse(arguments)
    from deployments.app import check  # imports Ray; --help should not wait for it

    errors = check(options.config)
    if errors:
        print(*errors, sep="\n", file=sys.stderr)
        return 1
    if not _port_is_free(options.port):
        print(
            f"PORT: {options.port} is taken on 127.0.0.1; choose another, as in `make serve PORT=8001`.",
            file=sys.stderr,
        )
        return 1
    file = config_file.read(options.config)
    derived = project_root() / ".expertscale" / f"serve-{options.port}.yaml"
    derived.parent.mkdir(parents=True, exist_ok=True)
    derived.write_text(file.derived(options.port))
    return _run(derived, options.port, file.args)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deployments.launch", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("config", type=Path, help="a config file, for example deployments/configs/demo.yaml")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port on 127.0.0.1")
    options = parser.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        parser.error(f"--port: {options.port} is not allowed; use 1 to 65535")
    return options


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _run(derived: Path, port: int, args: AppConfig) -> int:
    _adopt_orphans()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: stop.set())
    command = [str(Path(sys.executable).with_name("serve")), "run", str(derived)]
    started = time.monotonic()
    # Should this process be killed, `serve run` must not stay behind with nobody to stop it.
    process = subprocess.Popen(
        command,
        start_new_session=True,
        cwd=project_root(),
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGINT),
    )
    threading.Thread(target=_announce, args=(port, args, started, stop), daemon=True).start()
    try:
        while not stop.is_set() and process.poll() is None:
            stop.wait(POLL_S)
        if process.poll() is None:
            print("\nStopping: Serve first, then Ray ...", flush=True)
            process.send_signal(signal.SIGINT)
            _wait(process, SERVE_STOP_S)
    finally:
        stop.set()
        _end_leftovers()
    print("Stopped; nothing is left running.", flush=True)
    return 0 if process.returncode in (0, -signal.SIGINT) else 1


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that `_end_leftovers` can see them all."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_leftovers() -> None:
    """End what Ray left behind: ask first, then insist. Only descendants of this process are touched."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        _signal(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(left, timeout=LEFTOVER_STOP_S)
    for process in stubborn:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=LEFTOVER_STOP_S)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _announce(port: int, args: AppConfig, started: float, stop: threading.Event) -> None:
    """Wait until `/health` says that all is ready, then print what a newcomer needs."""
    url = f"http://127.0.0.1:{port}"
    while not stop.is_set():
        if _get(f"{url}/health") is not None:
            cluster = _get(f"{url}/v1/cluster", _cluster_key(args.security))
            print(_banner(url, args, time.monotonic() - started, cluster), flush=True)
            return
        stop.wait(POLL_S)


def _cluster_key(security: SecuritySpec) -> str | None:
    """An API key that may see the cluster; None where none is asked for, or none can be read."""
    name = security.admin_keys_file or security.api_keys_file
    if name is None:
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = map(str.strip, resolve(name).read_text(encoding="utf-8").splitlines())
        return next((line for line in lines if line and not line.startswith("#")), None)
    return None


def _get(url: str, key: str | None = None) -> dict[str, Any] | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except (urllib.error.URLError, OSError, ValueError):
        return None


def _banner(url: str, args: AppConfig, seconds: float, cluster: dict[str, Any] | None) -> str:
    model, keys = args.model.served_name, args.security.api_keys_file
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "def main():"}], "max_tokens": 48})
    lines = ["", f"ExpertScale serves {model} at {url} (ready after {seconds:.0f} s). Try:", ""]
    if keys is not None:
        lines.append(f"  KEY=...  # one of those in {keys}")
    sent = "-H 'Content-Type: application/json'" + ("" if keys is None else ' -H "Authorization: Bearer $KEY"')
    lines += [f"  curl {url}/v1/chat/completions {sent} -d '{body}'", ""]
    if cluster is not None:
        lines.append(f"Running (see {url}/v1/cluster):")
        lines.append(f"  routers    {len(cluster['routers'])}")
        for group in cluster["groups"]:
            ready = sum(replica["state"] == "ready" for replica in group["replicas"])
            lines.append(f"  {group['name']}  {ready} of {group['target_replicas']} replicas ready")
    if dashboard := _dashboard_url():
        lines.append(f"  dashboard  {dashboard}")
    lines += ["", "Ctrl-C stops everything.", ""]
    return "\n".join(lines)


def _dashboard_url() -> str | None:
    """Where our Ray's dashboard listens: at 8265, or the next free port if another Ray has that."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            if any(part.endswith("dashboard.py") for part in process.cmdline()):
                ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
                near = sorted(ports & set(range(DASHBOARD_PORT, DASHBOARD_PORT + DASHBOARD_TRIES)))
                return f"http://127.0.0.1:{near[0]}" if near else None
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
