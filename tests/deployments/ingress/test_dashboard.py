"""The page's files: kinds, policy, tags, packing, and that nothing else of the disk can be asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

import deployments.ingress
from deployments.ingress import dashboard
from deployments.ingress.auth import Authenticator, Keys
from deployments.ingress.keys import KeyRecord, digest_of
from tests.deployments.ingress.fakes import http, make_service, says

KEYS = Authenticator(Keys((KeyRecord("u", digest_of("u")),)), Keys((KeyRecord("a", digest_of("a")),)))
OWN = sorted(path.name for path in (Path(deployments.ingress.__file__).parent / "page").glob("*.*"))


def ask(path: str, **headers: str) -> httpx.Response:
    """From a server with keys, without one."""

    async def story() -> httpx.Response:
        async with http(make_service(says("x"), auth=KEYS)) as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.get(path, headers={"accept-encoding": "identity", **named})

    return asyncio.run(story())


def test_the_bundle_comes_out_of_the_installed_package_packed_and_tagged() -> None:
    plain = ask(f"/dashboard/{dashboard.BUNDLE}")
    assert plain.status_code == 200
    assert plain.headers["content-type"] == "text/javascript; charset=utf-8"
    assert "plotly.js" in plain.text[:200]
    packed = ask(f"/dashboard/{dashboard.BUNDLE}", accept_encoding="gzip")
    assert packed.content == plain.content, "httpx unpacks it"
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert packed.headers["etag"] != plain.headers["etag"]
    again = ask(f"/dashboard/{dashboard.BUNDLE}", accept_encoding="gzip", if_none_match=packed.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    assert ask(f"/dashboard/{dashboard.BUNDLE}", if_none_match='"other"').status_code == 200


def test_every_file_is_sent_with_a_policy_that_lets_nothing_in_from_elsewhere() -> None:
    headers = ask(f"/dashboard/{dashboard.BUNDLE}").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fapi.py", "%2e%2e%2fauth.py", "__init__.py", "..", ".js"])
def test_nothing_but_the_page_s_own_files_can_be_asked_for(name: str) -> None:
    response = ask(f"/dashboard/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("name", OWN)
def test_the_page_and_its_files_need_no_key_and_have_their_kinds(name: str) -> None:
    response = ask(f"/dashboard/{name}")
    assert response.status_code == 200
    assert response.headers["content-type"] == dashboard.KINDS[Path(name).suffix]
    if name == dashboard.PAGE:
        assert ask("/dashboard").content == response.content
