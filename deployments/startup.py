"""Watches an application start, from outside: is it ready, has it failed, and what to tell the terminal.

Asks over HTTP only: `/health` of the application, and Serve's own account of it at Ray's dashboard.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.config import AppConfig
from deployments.config_file import ConfigFile

DASHBOARD_PORT, DASHBOARD_TRIES = 8265, 50  # Ray's own
ASK_SERVE_EVERY_S = 3.0


class StartFailedError(Exception):
    """Serve has given up on the application; the message says why."""


class StartWatch:
    """url: where the application will answer. file: the config it was started from."""

    def __init__(self, url: str, file: ConfigFile) -> None:
        self._url = url
        self._file = file
        self._ask_serve_at = time.monotonic() + ASK_SERVE_EVERY_S

    def banner_when_ready(self, seconds: float) -> str | None:
        """The text for the terminal once a router and every group are ready, `seconds` after the start; else None.

        Raises:
            StartFailedError: it never will be.
        """
        if _get(f"{self._url}/health") is not None:
            args = self._file.args
            # Where an admin key is needed there is none to send: only hashes are known here.
            cluster = _get(f"{self._url}/v1/cluster")
            return _banner(self._url, args, seconds, cluster)
        if time.monotonic() >= self._ask_serve_at:
            reason = failure(_serve_details(), self._file.application)
            if reason is not None:
                raise StartFailedError(reason)
            self._ask_serve_at = time.monotonic() + ASK_SERVE_EVERY_S
        return None


def failure(details: Mapping[str, Any], application: str) -> str | None:
    """Why Serve has given up on `application`, from its instance details; None while it has not.

    Of the traceback of a replica only the last line is shown: the error itself. The rest is in the log above.
    """
    found = details.get("applications", {}).get(application, {})
    if found.get("status") != "DEPLOY_FAILED":
        return None
    for name, deployment in found.get("deployments", {}).items():
        if deployment.get("status") == "DEPLOY_FAILED":
            lines = [line.strip() for line in str(deployment.get("message", "")).splitlines() if line.strip()]
            errors = [line for line in lines if "Error: " in line]
            return f"{name}: {(errors or lines or ['see the log'])[-1]}"
    return (str(found.get("message", "")).strip() or "see the log").splitlines()[-1]


def _serve_details() -> Mapping[str, Any]:
    """Serve's instance details, or nothing where the dashboard does not answer yet."""
    url = _dashboard_url()
    details = None if url is None else _get(f"{url}/api/serve/applications/", _ray_token())
    return details or {}


def _ray_token() -> str | None:
    """The token Ray's dashboard asks for, from the places where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").read_text().strip()
    return None


def _get(url: str, key: str | None = None) -> dict[str, Any] | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return None


def _banner(url: str, args: AppConfig, seconds: float, cluster: dict[str, Any] | None) -> str:
    model, security = args.model.served_name, args.security
    keys = security.api_keys_file or security.api_keys_env
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "def main():"}], "max_tokens": 48})
    lines = ["", f"ExpertScale serves {model} at {url} (ready after {seconds:.0f} s). Try:", ""]
    if keys is not None:
        lines.append(f"  KEY=...  # one whose hash is in {keys}")
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
