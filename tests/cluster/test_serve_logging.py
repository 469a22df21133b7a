"""Our lines in Serve's log files, written by Serve's own handlers: as text, and each as one JSON object (3 s)."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from cluster.serve_logging import PACKAGES, about, log_through_serve
from deployments.router.engine import Engine
from tests.deployments.router.fake_backbone import FakeBackbone, make_request

Lines = Callable[[], list[str]]
SERVE = logging.getLogger("ray.serve")


@contextmanager
def logging_as(encoding: str, folder: Path, component: ServeComponentType | None, **ours: Any) -> Iterator[Lines]:
    """What a process of Serve has set up when our code is called; the lines of its log file."""
    loggers = [SERVE, *map(logging.getLogger, PACKAGES)]
    before = [(each, each.parent, each.level, each.propagate, each.handlers[:], each.filters[:]) for each in loggers]
    configure_component_logger(
        component_name="controller" if component is None else "expertscale_Router",
        component_id="abc",
        component_type=component,
        logging_config=LoggingConfig(encoding=encoding, logs_dir=str(folder)),
        max_bytes=1 << 20,
        backup_count=1,
    )
    log_through_serve(**ours)
    try:
        yield lambda: [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    finally:
        for handler in SERVE.handlers:
            handler.close()
        for each, parent, level, propagate, handlers, filters in before:
            each.parent, each.propagate, each.handlers, each.filters = parent, propagate, handlers, filters
            each.setLevel(level)


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_line_of_ours_is_one_object_with_its_extra_as_keys(package: str, tmp_path: Path) -> None:
    with logging_as("JSON", tmp_path, ServeComponentType.REPLICA) as lines:
        extra = {**about("an-id"), "completion_tokens": 5, "finish_reasons": ["stop", None]}
        in_a_thread(lambda: logging.getLogger(f"{package}.some.file").info("%d tokens\nout", 5, extra=extra))
        [line] = lines()
    said = json.loads(line)
    assert said["message"] == "5 tokens\nout"
    assert (said["levelname"], said["deployment"], said["replica"]) == ("INFO", "expertscale_Router", "abc")
    assert (said["request_id"], said["completion_tokens"], said["finish_reasons"]) == ("an-id", 5, ["stop", None])
    assert said["asctime"]


def test_several_requests_are_a_list(tmp_path: Path) -> None:
    with logging_as("JSON", tmp_path, ServeComponentType.REPLICA) as lines:
        logging.getLogger("deployments.router.engine").warning("failed", extra=about("a", "b", "a", ""))
        [line] = lines()
    assert json.loads(line)["request_ids"] == ["a", "b"]
    assert "request_id" not in json.loads(line)


def test_an_exception_stays_within_its_object(tmp_path: Path) -> None:
    with logging_as("JSON", tmp_path, ServeComponentType.REPLICA) as lines:
        try:
            raise OSError("gone")
        except OSError:
            logging.getLogger("cluster.fabric.server").exception("stopped")
        [line] = lines()
    assert "OSError: gone" in json.loads(line)["exc_text"]


def test_the_controllers_lines_are_objects_too(tmp_path: Path) -> None:
    with logging_as("JSON", tmp_path, None) as lines:
        logging.getLogger("autoscale.serve_policy").info("experts-0: 1 -> 2")
        [line] = lines()
    said = json.loads(line)
    assert (said["component_name"], said["message"]) == ("controller", "experts-0: 1 -> 2")
    assert "deployment" not in said


def test_text_shows_the_id_of_a_line_from_any_thread(tmp_path: Path) -> None:
    with logging_as("TEXT", tmp_path, ServeComponentType.REPLICA) as lines:
        in_a_thread(lambda: logging.getLogger("deployments.x").info("said", extra=about("an-id")))
        in_a_thread(lambda: logging.getLogger("deployments.x").info("of nobody", extra=about("")))
        with_id, without = lines()
    assert with_id.endswith(" expertscale_Router abc an-id -- said")
    assert without.endswith(" expertscale_Router abc -- of nobody")


def test_text_shows_every_id_of_a_line_about_several_requests(tmp_path: Path) -> None:
    with logging_as("TEXT", tmp_path, ServeComponentType.REPLICA) as lines:
        engine = Engine(FakeBackbone(), max_batch_tokens=8, max_sequences=8, max_queued_requests=8)
        for name in ("one", "two"):
            engine.submit(make_request([5], f"cmpl-{name}", x_request_id=f"order-{name}"), lambda _: None)
        engine._backbone.before_forward = lambda _: 1 / 0  # type: ignore[attr-defined]
        engine.turn()
        [line, *_] = lines()
    assert line.endswith(
        " -- a step of 2 tokens failed, and with it cmpl-one, cmpl-two (x-request-id order-one, order-two)"
    )


@pytest.mark.parametrize(("access", "wanted"), [(True, ["CALL generate OK", "said"]), (False, ["said"])])
def test_serves_line_for_each_call_can_be_left_out(access: bool, wanted: list[str], tmp_path: Path) -> None:
    with logging_as("JSON", tmp_path, ServeComponentType.REPLICA, access=access) as lines:
        SERVE.info("CALL generate OK", extra={"serve_access_log": True})
        logging.getLogger("deployments.x").info("said")
        assert [json.loads(line)["message"] for line in lines()] == wanted
