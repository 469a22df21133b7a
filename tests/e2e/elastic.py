"""The elastic demo under test: a server whose policy file the test owns, eyes on its replicas, hands on its policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import psutil
import yaml

from autoscale.spec import PolicySpec
from infra.bench.serve_rest import ServeRest, is_connected
from tests.e2e.load import Load
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

CONFIG = ROOT / "deployments" / "configs" / "elastic.yaml"
POLICY = ROOT / "autoscale" / "policies" / "elastic.yaml"
WATCH_S = 0.2


class Elastic:
    """One running cluster. application: as deployed. log: what the server prints."""

    def __init__(self, server: Server, application: dict[str, Any], policy_file: Path, load: Load) -> None:
        self.server = server
        self.application = application
        self.load = load
        self._policy_file = policy_file
        self.policy: dict[str, Any] = yaml.safe_load(policy_file.read_text())

    @cached_property
    def rest(self) -> ServeRest:
        """Serve's REST API; only where the server has started Ray itself."""
        return ServeRest(psutil.Process(self.server.process.pid))

    def cluster(self) -> dict[str, Any]:
        """The body of `/v1/cluster`."""
        answer: dict[str, Any] = self.server.get("/v1/cluster")
        return answer

    def group(self, name: str) -> dict[str, Any]:
        """One group of `/v1/cluster`."""
        found: dict[str, Any] = next(group for group in self.cluster()["groups"] if group["name"] == name)
        return found

    def targets(self) -> dict[str, int]:
        """Group -> replicas asked for."""
        return {group["name"]: group["target_replicas"] for group in self.cluster()["groups"]}

    def ready(self) -> dict[str, int]:
        """Group -> replicas that take rows."""
        return {
            group["name"]: sum(replica["state"] == "ready" for replica in group["replicas"])
            for group in self.cluster()["groups"]
        }

    def rows(self) -> dict[str, int]:
        """Group -> rows its present replicas have computed."""
        return {
            group["name"]: sum(replica["rows"] or 0 for replica in group["replicas"])
            for group in self.cluster()["groups"]
        }

    def decisions(self, since: float) -> list[dict[str, Any]]:
        """Decisions after a moment (Unix seconds), oldest first."""
        return [decision for decision in self.cluster()["decisions"] if decision["time"] > since]

    def edit_policy(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the policy file and wait until the change is in force."""
        # A Directory that has just been restarted has not heard of the policy yet, or does not answer at all.
        before = wait_for(self._policy_in_force, 30, "a policy in force")["version"]
        change(self.policy)
        if self.policy_text != self._policy_file.read_text():
            self.write_policy(self.policy_text)
            wait_for(lambda: (self._policy_in_force() or {}).get("version", before) != before, 30, "the new policy")

    def _policy_in_force(self) -> dict[str, Any] | None:
        with suppress(OSError):
            return cast(dict[str, Any] | None, self.cluster()["policy"])
        return None

    @property
    def spec(self) -> PolicySpec:
        """The policy as the tests want it, with its defaults."""
        return PolicySpec.model_validate(self.policy)

    @property
    def policy_text(self) -> str:
        """The policy as the tests want it, whatever is in the file."""
        return yaml.safe_dump(self.policy)

    def write_policy(self, text: str) -> None:
        """Replace the policy file, as editors do: write aside and rename."""
        aside = self._policy_file.with_suffix(".new")
        aside.write_text(text)
        aside.replace(self._policy_file)

    def settle(self, replicas: int, *, timeout_s: float = 60) -> None:
        """Wait until every group has that many replicas, asked for and ready, and none is stopping."""

        def settled() -> bool:
            states = self.rest.replica_states(self.application["name"])
            return (
                set(self.targets().values()) == {replicas}
                and set(self.ready().values()) == {replicas}
                and all(len(found) == replicas for name, found in states.items() if name.startswith("experts-"))
            )

        wait_for(settled, timeout_s, f"{replicas} replicas of every group")

    def pids(self, group: str) -> set[int]:
        """Processes of the group's replicas."""
        return self.rest.replica_pids(self.application["name"], group)


class Watch:
    """Counts expert replicas in every state, all the time, in a thread of its own."""

    def __init__(self, elastic: Elastic) -> None:
        self.most = 0
        self.looks = 0
        self._elastic = elastic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._stop.wait(WATCH_S):
            states = self._elastic.rest.replica_states(self._elastic.application["name"])
            held = sum(len(found) for name, found in states.items() if name.startswith("experts-"))
            self.most = max(self.most, held)
            self.looks += 1


def first_rows_s(elastic: Elastic, group: str, known: set[int], decided_at: float, timeout_s: float = 60) -> float:
    """Seconds from a decision (Unix seconds) until a router connects to a replica that is not among `known`."""
    wait_for(
        lambda: any(map(is_connected, elastic.pids(group) - known)), timeout_s, f"rows for a new replica of {group}"
    )
    return time.time() - decided_at


@contextmanager
def elastic_server(
    folder: Path,
    load_of: Callable[[Server], Load],
    *,
    change: Callable[[dict[str, Any], dict[str, Any]], None] = lambda _config, _policy: None,
    environment: dict[str, str] | None = None,
) -> Iterator[Elastic]:
    """`configs/elastic.yaml` with its own copy of the policy file, running.

    change: of the config and the policy before the start. environment: of the server, see `serving`.
    """
    policy = folder / "policy.yaml"
    document, rules = yaml.safe_load(CONFIG.read_text()), yaml.safe_load(POLICY.read_text())
    change(document, rules)
    policy.write_text(yaml.safe_dump(rules))
    document["applications"][0]["autoscaling_policy"]["policy_kwargs"]["policy_file"] = str(policy)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document, allow_unicode=True))
    port = free_port()
    with serving(launch(config, port), port, folder / "log", environment=environment) as server:
        elastic = Elastic(server, document["applications"][0], policy, load_of(server))
        wait_for(lambda: elastic.cluster()["policy"], 30, "a policy in force")
        yield elastic
