"""`make serve`: check the config, run `serve run` in the foreground, say when it answers, leave nothing behind.

    python -m deployments.launch CONFIG --port 8000

Knows processes and terminals; what is served is `deployments.app`'s business. `serve run` is started in a session of
its own, so that Ctrl-C reaches it once and in order (Serve first, then Ray), not every process of the cluster at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from cluster.config import project_root
from cluster.errors import ConfigError
from cluster.keys import new_key
from deployments import config_file
from deployments.config_file import ConfigFile
from deployments.startup import StartFailedError, StartWatch

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_S = 0.25
SERVE_STOP_S = 30.0
LEFTOVER_STOP_S = 5.0
CLUSTER_ANSWERS_S = 2.0
SERVE_ENV = Path(__file__).with_name("serve.env")


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
    try:
        encoding = file.encoding(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    derived = project_root() / ".expertscale" / f"serve-{options.port}.yaml"
    derived.parent.mkdir(parents=True, exist_ok=True)
    derived.write_text(file.derived(options.port, os.environ))
    return _run(derived, options.port, file, encoding)


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


def _run(derived: Path, port: int, file: ConfigFile, encoding: str) -> int:
    _adopt_orphans()
    stop, failed = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: stop.set())
    command = [sys.executable, "-m", "deployments.serve_run", "run", str(derived)]
    environment = {**serve_environment(), **os.environ, config_file.ENCODING_VARIABLE: encoding}
    gone = recorded_cluster_that_is_gone()
    if gone is not None and "RAY_ADDRESS" not in environment:
        print(f"The Ray cluster that {_record()} names, {gone}, does not answer; starting one of our own.", flush=True)
        environment["RAY_ADDRESS"] = "local"
    if environment.get("RAY_ADDRESS", "local") == "local":
        # A key for this start alone, never on disk. Whatever this Ray starts inherits it, replicas of a later
        # `serve deploy` too; a cluster that is joined would not.
        environment.setdefault(file.args.security.cluster_key_env, new_key())
    # Should this process be killed, `serve run` must not stay behind with nobody to stop it.
    process = subprocess.Popen(
        command,
        start_new_session=True,
        cwd=project_root(),
        env=environment,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGINT),
    )
    watch = StartWatch(f"http://127.0.0.1:{port}", file)
    threading.Thread(target=_announce, args=(watch, stop, failed), daemon=True).start()
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
    return 0 if process.returncode in (0, -signal.SIGINT) and not failed.is_set() else 1


def recorded_cluster_that_is_gone() -> str | None:
    """The address of the cluster Ray would join by itself, where nobody listens there; None where it can be joined.

    A killed cluster or a crashed machine leaves its record behind, and Ray waits minutes for such a cluster.
    """
    try:
        address = _record().read_text().strip()
    except OSError:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_ANSWERS_S).close()
    except (OSError, ValueError):
        return address
    return None


def _record() -> Path:
    """Where Ray writes the address of the machine's running cluster (`ray start` does, `ray.init` does not)."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"


def serve_environment() -> dict[str, str]:
    """The variables of `serve.env`; those that are set already go before them."""
    lines = (line.strip() for line in SERVE_ENV.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _announce(watch: StartWatch, stop: threading.Event, failed: threading.Event) -> None:
    """Print what a newcomer needs once all is ready; stop everything where it never will be."""
    started = time.monotonic()
    while not stop.wait(POLL_S):
        try:
            banner = watch.banner_when_ready(time.monotonic() - started)
        except StartFailedError as error:
            print(f"\nThe application cannot start: {error}", file=sys.stderr, flush=True)
            failed.set()
            stop.set()
            return
        if banner is not None:
            print(banner, flush=True)
            return


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
