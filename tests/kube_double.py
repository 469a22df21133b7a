"""A double of the Kubernetes API over HTTP, for tests: no API server can be had here. What it does not do, it refuses.

It speaks what our code, the Python client and kubectl ask of nodes, RayServices, RayClusters and a few native kinds:
get, list in pages, watch with bookmarks, create, replace, delete; JSON patch, merge patch and apply; the subresource
/status; versions with 409; 410 for versions that were compacted away; 403 for whatever a role does not allow; writes
validated by the schemas of the custom resources where they are at hand. `outage` cuts every connection.

Not here, and so not shown by tests that use it: defaulting, field ownership of server-side apply (it is a merge),
strategic merge by keys (lists are replaced), admission, KubeRay's operator.
"""

from __future__ import annotations

import copy
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

SCHEMAS = Path(__file__).resolve().parent.parent.parent / "shared" / "kuberay"
KINDS = {
    ("", "v1"): {"nodes": "Node", "configmaps": "ConfigMap", "namespaces": "Namespace"},
    ("ray.io", "v1"): {"rayservices": "RayService", "rayclusters": "RayCluster"},
}
CLUSTER_WIDE = {"nodes", "namespaces"}
REASONS = {403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired", 422: "Invalid", 400: "BadRequest"}

Key = tuple[str, str | None, str]
"""(resource, namespace, name)"""


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason or REASONS.get(code, "InternalError")


@dataclass(frozen=True)
class Request:
    """One that was answered. verb: as roles call it. code: of the answer."""

    verb: str
    resource: str
    name: str | None
    content_type: str
    code: int


@dataclass
class KubernetesDouble:
    """The state of the double. allowed: rules as in a Role; None: everything. requests: all that were answered.

    token: what requests must carry; None for anything.
    interfere: called before each patch with its key, once per entry: to change the object under somebody's hands.
    """

    url: str = ""
    allowed: Sequence[Mapping[str, Any]] | None = None
    token: str | None = None
    requests: list[Request] = field(default_factory=list)
    interfere: list[Any] = field(default_factory=list)
    page_size: int | None = None
    _objects: dict[Key, dict[str, Any]] = field(default_factory=dict)
    _events: list[tuple[int, str, Key, dict[str, Any]]] = field(default_factory=list)
    _version: int = 1
    _oldest: int = 0
    _down: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, item: Mapping[str, Any], namespace: str | None = "prod") -> dict[str, Any]:
        """Create or replace an object, as an operator would: no role is asked, the schema is."""
        resource = next(r for kinds in KINDS.values() for r, kind in kinds.items() if kind == item["kind"])
        key = (resource, None if resource in CLUSTER_WIDE else namespace, item["metadata"]["name"])
        with self._changed:
            return self._store(key, copy.deepcopy(dict(item)), with_status=True)

    def get(self, resource: str, name: str, namespace: str | None = "prod") -> dict[str, Any]:
        with self._changed:
            return copy.deepcopy(self._objects[(resource, None if resource in CLUSTER_WIDE else namespace, name)])

    def change(self, resource: str, name: str, patch: Mapping[str, Any], namespace: str | None = "prod") -> None:
        """Merge something into an object, whoever watches."""
        key = (resource, None if resource in CLUSTER_WIDE else namespace, name)
        with self._changed:
            self._store(key, merged(self._objects[key], patch), with_status=True)

    def delete(self, resource: str, name: str, namespace: str | None = "prod") -> None:
        key = (resource, None if resource in CLUSTER_WIDE else namespace, name)
        with self._changed:
            item = self._objects.pop(key)
            self._emit("DELETED", key, item)

    def compact(self) -> None:
        """Forget all versions so far: lists that go on, and watches from them, are answered 410."""
        with self._changed:
            self._version += 1
            self._oldest = self._version
            self._events.clear()
            self._changed.notify_all()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Every connection is cut without an answer."""
        self.go_away()
        try:
            yield
        finally:
            self._down = False

    def go_away(self) -> None:
        """For good: watches end, too."""
        with self._changed:
            self._down = True
            self._changed.notify_all()

    def count(self, verb: str, resource: str) -> int:
        """How many such requests were answered."""
        return Counter((each.verb, each.resource) for each in list(self.requests))[(verb, resource)]

    def _emit(self, kind: str, key: Key, item: Mapping[str, Any]) -> None:
        self._version += 1
        shown = copy.deepcopy(dict(item))
        shown["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, kind, key, shown))
        self._changed.notify_all()

    def _store(self, key: Key, item: dict[str, Any], with_status: bool) -> dict[str, Any]:
        """Keep an object; its status only through /status, as custom resources with that subresource have it."""
        before = self._objects.get(key)
        if not with_status and key[0] in KINDS[("ray.io", "v1")]:
            item.pop("status", None)
            if before is not None and "status" in before:
                item["status"] = copy.deepcopy(before["status"])
        validate(item)
        metadata = item["metadata"]
        metadata.setdefault("uid", f"uid-{self._version}")
        metadata.setdefault("creationTimestamp", "2026-11-30T00:00:00Z")
        metadata["generation"] = (before or {}).get("metadata", {}).get("generation", 0) + 1
        if key[1] is not None:
            metadata["namespace"] = key[1]
        self._emit("ADDED" if before is None else "MODIFIED", key, item)
        metadata["resourceVersion"] = str(self._version)
        self._objects[key] = item
        return copy.deepcopy(item)


@cache
def _validator(kind: str) -> Any:
    """The strict schema of a custom resource; None where it is not at hand."""
    path = SCHEMAS / f"{kind.lower()}s.v1.schema.json"
    if not path.exists():
        return None
    import jsonschema

    schema = strict(json.loads(path.read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> Any:
    """A CRD's schema by which unknown fields are wrong."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if made.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in made:
        made["properties"] = {name: strict(each) for name, each in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if "items" in made:
        made["items"] = strict(made["items"])
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(made["additionalProperties"])
    return made


def has_schemas() -> bool:
    """Whether writes are validated."""
    return (SCHEMAS / "rayclusters.v1.schema.json").exists()


def validate(item: Mapping[str, Any]) -> None:
    """Raises: Refusal: by the schema, or by KubeRay's own rule on a worker group's bounds."""
    validator = _validator(item["kind"]) if item["kind"].startswith("Ray") else None
    error = None if validator is None else next(iter(validator.iter_errors(item)), None)
    if error is not None:
        raise Refusal(422, f"{'.'.join(map(str, error.path))}: {error.message[:200]}")
    for group in item.get("spec", {}).get("workerGroupSpecs", []) if item["kind"] == "RayCluster" else []:
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
            raise Refusal(422, f"worker group {group.get('groupName')}: minReplicas exceeds maxReplicas")


def merged(item: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    made = dict(item) if isinstance(item, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = merged(made.get(name), value)
    return made


def json_patched(item: Any, patch: Iterable[Mapping[str, Any]]) -> Any:
    """RFC 6902, its operations add, replace, remove and test."""
    made = copy.deepcopy(item)
    for operation in patch:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place = made
        try:
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place[part]
            at: Any = (len(place) if last == "-" else int(last)) if isinstance(place, list) else last
            match operation["op"]:
                case "add" if isinstance(place, list):
                    place.insert(at, operation["value"])
                case "add":
                    place[at] = operation["value"]
                case "replace":
                    place[at]
                    place[at] = operation["value"]
                case "remove":
                    del place[at]
                case "test" if place[at] != operation["value"]:
                    raise Refusal(422, f"the test of {operation['path']} failed")
        except (KeyError, IndexError, ValueError, TypeError):
            raise Refusal(422, f"there is no {operation['path']}") from None
    return made


def serve_double(certificate: tuple[Path, Path] | None = None) -> tuple[KubernetesDouble, ThreadingHTTPServer]:
    """A double that answers on a free port of loopback; the server is to be shut down. certificate: file and key."""
    double = KubernetesDouble()

    class Handler(_Handler):
        state = double

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    double.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return double, server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: KubernetesDouble

    def log_message(self, *_args: Any) -> None: ...

    def do_GET(self) -> None:
        if self.state._down:
            self.close_connection = True
            return
        url = urlparse(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        self.content_type = self.headers.get("Content-Type", "")
        self.asked = ("", "", None)
        try:
            shown = self.headers.get("Authorization", "").lower()
            if self.state.token is not None and shown != f"bearer {self.state.token}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            code, answer = self.answer(url.path.strip("/").split("/"))
        except Refusal as refusal:
            code = refusal.code
            answer = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {}}
            answer |= {"message": str(refusal), "reason": refusal.reason, "code": code}
            if code == 422:
                # All that older kubectls print of it.
                causes = [{"reason": "FieldValueInvalid", "message": str(refusal), "field": "spec"}]
                answer["details"] = {"name": self.asked[2], "kind": self.asked[1], "causes": causes}
        self.state.requests.append(Request(*self.asked, self.content_type, code))
        if answer is not None:
            raw = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def answer(self, path: list[str]) -> tuple[int, Any]:
        """(status, body); None as a body once it has been streamed."""
        discovered = discovery(path)
        if discovered is not None:
            return 200, discovered
        if path[0] not in ("api", "apis") or len(path) < (3 if path[0] == "api" else 4):
            raise Refusal(404, "the server could not find the requested resource")
        group, version, rest = ("", path[1], path[2:]) if path[0] == "api" else (path[1], path[2], path[3:])
        namespace = None
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        resource, name, subresource = [*rest, None, None][:3]
        if resource not in KINDS.get((group, version), {}):
            raise Refusal(404, "the server could not find the requested resource")
        assert resource is not None
        watches = self.query.get("watch") in ("true", "1")
        verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        verb = verbs.get(self.command, "get" if name else "watch" if watches else "list")
        self.asked = (verb, resource, name)
        self.authorize(group, resource if subresource is None else f"{resource}/{subresource}", verb, name)
        if verb == "watch" or (watches and name):
            self.watch(resource, namespace, name)
            return 200, None
        with self.state._changed:
            if verb == "list":
                return 200, self.listed(group, version, resource, namespace)
            return self.one(group, version, resource, namespace, name, subresource, verb)

    def authorize(self, group: str, resource: str, verb: str, name: str | None) -> None:
        if self.state.allowed is None:
            return
        for rule in self.state.allowed:
            named = "resourceNames" not in rule or name in rule["resourceNames"]
            if named and group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]:
                return
        raise Refusal(403, f'{resource} is forbidden: User "system:serviceaccount:prod:test" cannot {verb} it')

    def listed(self, group: str, version: str, resource: str, namespace: str | None) -> dict[str, Any]:
        state = self.state
        start, at = 0, state._version
        if token := self.query.get("continue"):
            start, at = map(int, token.split("@"))
            if at < state._oldest:
                raise Refusal(410, "the provided continue parameter is too old")
        found = [
            item
            for key, item in sorted(state._objects.items(), key=lambda pair: pair[0][2])
            if key[0] == resource and namespace in (None, key[1]) and self.selected(item)
        ]
        limit = min(int(self.query.get("limit") or 10**9), state.page_size or 10**9)
        metadata = {"resourceVersion": str(at)}
        if start + limit < len(found):
            metadata["continue"] = f"{start + limit}@{at}"
        kind = KINDS[(group, version)][resource]
        return {
            "kind": f"{kind}List",
            "apiVersion": f"{group}/{version}" if group else version,
            "metadata": metadata,
            "items": found[start : start + limit],
        }

    def selected(self, item: Mapping[str, Any]) -> bool:
        labels = item["metadata"].get("labels") or {}
        wanted = [each.partition("=") for each in self.query.get("labelSelector", "").split(",") if each]
        fields = [each.partition("=") for each in self.query.get("fieldSelector", "").split(",") if each]
        return all(labels.get(name) == value.lstrip("=") for name, _, value in wanted) and all(
            item["metadata"]["name"] == value for name, _, value in fields if name == "metadata.name"
        )

    def one(
        self,
        group: str,
        version: str,
        resource: str,
        namespace: str | None,
        name: str | None,
        subresource: str | None,
        verb: str,
    ) -> tuple[int, Any]:
        """A request about one object."""
        state = self.state
        sent = yaml.safe_load(self.body) if self.body else None
        if verb == "create":
            name = sent["metadata"]["name"]
        assert name is not None
        key = (resource, namespace, name)
        if verb == "patch" and state.interfere:
            state.interfere.pop(0)(key)
        before = state._objects.get(key)
        if verb == "create":
            if before is not None:
                raise Refusal(409, f'{resource} "{name}" already exists', "AlreadyExists")
            return 201, self.stored(key, {**sent, **self.typed(group, version, resource)}, None)
        if before is None and not (verb == "patch" and "apply-patch" in self.content_type):
            raise Refusal(404, f'{resource} "{name}" not found')
        if verb == "get":
            return 200, copy.deepcopy(before)
        if verb == "delete":
            state._objects.pop(key)
            state._emit("DELETED", key, before or {})
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if verb == "update":
            made = sent
        elif "json-patch" in self.content_type:
            made = json_patched(before, sent)
        elif before is None:
            return 201, self.stored(key, {**sent, **self.typed(group, version, resource)}, None)
        else:
            made = merged(before, sent)
        asked_for = made["metadata"].get("resourceVersion")
        assert before is not None
        if asked_for and asked_for != before["metadata"]["resourceVersion"]:
            raise Refusal(409, f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified')
        if subresource == "status":
            made = {**copy.deepcopy(before), "status": made.get("status", {})}
        return 200, self.stored(key, made, subresource)

    def stored(self, key: Key, item: dict[str, Any], subresource: str | None) -> dict[str, Any]:
        if self.query.get("dryRun"):
            validate(item)
            return item
        return self.state._store(key, item, with_status=subresource == "status")

    @staticmethod
    def typed(group: str, version: str, resource: str) -> dict[str, str]:
        return {
            "kind": KINDS[(group, version)][resource],
            "apiVersion": f"{group}/{version}" if group else version,
        }

    def watch(self, resource: str, namespace: str | None, name: str | None) -> None:
        """Events since a version, until the time asked for is over or the server goes away."""
        state = self.state
        seen = int(self.query.get("resourceVersion") or state._version)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        until = time.monotonic() + float(self.query.get("timeoutSeconds", 300))
        while not state._down:
            with state._changed:
                if seen < state._oldest:
                    message = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
                    self.chunk({"type": "ERROR", "object": message})
                    break
                news = [event for event in state._events if event[0] > seen]
                left = until - time.monotonic()
                if not news and left > 0:
                    state._changed.wait(min(left, 0.5))
                    continue
            seen = news[-1][0] if news else seen
            for _, kind, key, item in news:
                if key[0] == resource and namespace in (None, key[1]) and name in (None, key[2]):
                    self.chunk({"type": kind, "object": item})
            if not news:
                if self.query.get("allowWatchBookmarks") == "true":
                    metadata = {"resourceVersion": str(seen)}
                    self.chunk({"type": "BOOKMARK", "object": {"kind": "Node", "metadata": metadata}})
                break
        if state._down:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def chunk(self, event: Mapping[str, Any]) -> None:
        raw = json.dumps(event).encode() + b"\n"
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()


def discovery(path: list[str]) -> dict[str, Any] | None:
    """What kubectl asks before anything else."""
    if path == ["version"]:
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == ["apis"]:
        version = {"groupVersion": "ray.io/v1", "version": "v1"}
        groups = [{"name": "ray.io", "versions": [version], "preferredVersion": version}]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    group = ("", path[1]) if path[0] == "api" and len(path) == 2 else tuple(path[1:]) if len(path) == 3 else None
    if group not in KINDS or path[0] not in ("api", "apis"):
        return None
    verbs = ["get", "list", "watch", "create", "update", "patch", "delete"]
    resources = [
        {
            "name": each,
            "singularName": kind.lower(),
            "namespaced": each not in CLUSTER_WIDE,
            "kind": kind,
            "verbs": verbs,
        }
        for each, kind in KINDS[group].items()  # type: ignore[index]
    ]
    version = "/".join(filter(None, group))
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
