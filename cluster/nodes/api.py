"""The requests that are made of the Kubernetes API, with a deadline each, and what a refusal means, as a sentence.

Objects are taken as they come, as JSON: building the client's model of every node takes far longer than reading it. The
client's part is whom to ask and how to prove who we are. `kubernetes` is imported by `connect` alone.

    ApiTrouble           what is wrong in one sentence; tried again after a back-off
    ├── ForbiddenTrouble    401, 403: nothing changes until somebody changes a role; asked again only now and then
    ├── MissingTrouble      404: there is no such object
    ├── ConflictTrouble     409, 422: it has changed since it was read; to be read and planned again at once
    └── GoneTrouble         410: the version asked for is too old; to be listed anew
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.nodes.place import Place

CONNECT_S, ANSWER_S = 3.0, 10.0
PAGE = 250
"""Nodes in one answer."""
RAY = "/apis/ray.io/v1/namespaces"
_JSON_PATCH = "application/json-patch+json"


class ApiTrouble(Exception):
    """What is wrong, in one sentence."""


class ForbiddenTrouble(ApiTrouble):
    """A verb that the service account lacks."""


class MissingTrouble(ApiTrouble):
    """There is no such object."""


class ConflictTrouble(ApiTrouble):
    """The object has changed meanwhile."""


class GoneTrouble(ApiTrouble):
    """The version asked for is too old."""


class Api:
    """The API of one cluster. Blocking; every request ends within `ANSWER_S` of silence. Raises: ApiTrouble."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self._namespace = namespace

    def rayservice(self, name: str) -> dict[str, Any]:
        """A RayService of our namespace."""
        return self._ask("get", "rayservices", name)

    def raycluster(self, name: str) -> dict[str, Any]:
        """A RayCluster of our namespace."""
        return self._ask("get", "rayclusters", name)

    def patch_raycluster(self, name: str, patch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Change it by JSON patch; ConflictTrouble where it is not the one the patch was planned for."""
        return self._ask("patch", "rayclusters", name, body=list(patch))

    def nodes(self) -> tuple[list[dict[str, Any]], str]:
        """(all nodes, the version they were listed at)."""
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"limit": PAGE}
        while True:
            answer = self._ask("list", "nodes", query=page)
            found += answer.get("items") or []
            metadata = answer.get("metadata") or {}
            if not metadata.get("continue"):
                return found, str(metadata.get("resourceVersion") or "")
            page["continue"] = metadata["continue"]

    def watch_nodes(self, version: str, seconds: float) -> Iterator[dict[str, Any]]:
        """Events since `version`, for so long at most; GoneTrouble where nobody remembers it."""
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": int(seconds),
        }
        # Silence is usual here: the server ends the watch by itself, and a connection that was cut must not outlast it.
        response = self._send("watch", "nodes", query=query, answer_s=seconds + ANSWER_S)
        lines = response.response
        try:
            rest = b""
            for chunk in lines.stream(amt=None):
                *complete, rest = (rest + chunk).split(b"\n")
                yield from (_event(line) for line in complete if line.strip())
        except ApiTrouble:
            raise
        except Exception as error:
            raise ApiTrouble(f"the watch of nodes was cut off ({_short(error)})") from None
        finally:
            lines.close()

    def _ask(
        self,
        verb: str,
        resource: str,
        name: str | None = None,
        query: Mapping[str, Any] | None = None,
        body: list[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        response = self._send(verb, resource, name, query, body)
        try:
            found = json.loads(response.read())
        except Exception as error:
            raise ApiTrouble(f"the API server's answer to {verb} {resource} is no answer ({_short(error)})") from None
        if not isinstance(found, dict):
            raise ApiTrouble(f"the API server's answer to {verb} {resource} is no object")
        return found

    def _send(
        self,
        verb: str,
        resource: str,
        name: str | None = None,
        query: Mapping[str, Any] | None = None,
        body: list[Mapping[str, Any]] | None = None,
        answer_s: float = ANSWER_S,
    ) -> Any:
        path = "/api/v1/nodes" if resource == "nodes" else f"{RAY}/{{namespace}}/{resource}/{{name}}"
        headers = {"Accept": "application/json"} | ({} if body is None else {"Content-Type": _JSON_PATCH})
        try:
            request = self._client.param_serialize(
                "GET" if body is None else "PATCH",
                path,
                path_params={} if resource == "nodes" else {"namespace": self._namespace, "name": name},
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._client.call_api(*request, _request_timeout=(CONNECT_S, answer_s))
        except Exception as error:
            raise ApiTrouble(f"the API server does not answer ({_short(error)})") from None
        if 200 <= response.status < 300:
            return response
        raise self._trouble(response, verb, resource, name)

    def _trouble(self, response: Any, verb: str, resource: str, name: str | None) -> ApiTrouble:
        """What a refusal means."""
        status = int(response.status)
        where = "" if resource == "nodes" else f" in namespace {self._namespace!r}"
        what = resource if name is None else f"{resource} {name!r}"
        if status == 401:
            return ForbiddenTrouble(
                "the API server does not know who we are (401): its token or kubeconfig are not valid"
            )
        if status == 403:
            kind = "ClusterRole" if resource == "nodes" else "Role"
            return ForbiddenTrouble(
                f"the service account may not {verb} {what}{where} (403): its {kind} needs the verb {verb!r} on "
                f"{resource!r}"
            )
        if status == 404:
            return MissingTrouble(f"there is no {what}{where} (404)")
        message = _message(response)
        if status in (409, 422):
            return ConflictTrouble(f"{verb} of {what}{where} was refused ({status}): {message}")
        if status == 410:
            return GoneTrouble(f"{verb} of {what}: the version asked for is gone (410)")
        return ApiTrouble(f"the API server refuses to {verb} {what}{where} ({status}): {message}")


def connect(place: Place) -> Api:
    """An API to talk to; nothing is asked yet.

    Raises:
        ApiTrouble: the kubeconfig or the service account's files cannot be read.
    """
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration

    configuration = Configuration()
    # Back-off is the keeper's: the client's own retries would triple every deadline.
    configuration.retries = 0
    # It warns of each retry on its own.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        if place.kubeconfig is None:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=place.kubeconfig, client_configuration=configuration, persist_config=False
            )
        return Api(ApiClient(configuration), place.namespace)
    except Exception as error:
        source = "the service account of this pod" if place.kubeconfig is None else f"kubeconfig {place.kubeconfig!r}"
        raise ApiTrouble(f"{source} cannot be used ({_short(error)})") from None


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
        kind, item = event["type"], event["object"]
    except (KeyError, TypeError, ValueError):
        raise ApiTrouble("the watch of nodes brought something that is no event") from None
    if kind == "ERROR":
        if item.get("code") == 410:
            raise GoneTrouble("watch of nodes: the version asked for is gone (410)")
        raise ApiTrouble(f"the watch of nodes failed: {str(item.get('message'))[:200]}")
    return {"type": kind, "object": item}


def _message(response: Any) -> str:
    try:
        return str(json.loads(response.read())["message"])[:200]
    except Exception:
        return "no reason given"


def _short(error: Exception) -> str:
    """A client's error names hosts, addresses and objects of its own: its kind and the last cause are enough."""
    cause = getattr(error, "reason", None)
    kind = type(cause).__name__ if isinstance(cause, Exception) else type(error).__name__
    return kind if isinstance(cause, Exception) or not str(error) else f"{kind}: {str(error).splitlines()[0][:120]}"
