"""Errors survive the way between processes, and say what HTTP clients need. Milliseconds."""

import inspect
import pickle

import pytest

from cluster import errors
from cluster.errors import ExpertScaleError, OverloadedError, RequestError

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ExpertScaleError)]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_after_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("what went wrong")))
    assert type(error) is kind
    assert str(error) == "what went wrong"
    assert (error.status, error.retryable, error.kind) == (kind.status, kind.retryable, kind.kind)


def test_the_fields_of_an_error_survive_pickling():
    error = pickle.loads(pickle.dumps(errors.ModelNotFoundError("no such model", "model", "model_not_found")))
    assert (error.param, error.code) == ("model", "model_not_found")
    assert pickle.loads(pickle.dumps(OverloadedError("busy", 7))).retry_after_s == 7


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_tree_at_the_head_of_the_file_and_explained(kind):
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.__doc__


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_only_the_clients_own_mistakes_are_4xx(kind):
    blames_client = issubclass(kind, RequestError | OverloadedError)
    assert (400 <= kind.status < 500) == blames_client
    assert 400 <= kind.status < 600


def test_what_a_retry_can_help_is_marked():
    assert {kind.__name__ for kind in EVERY if kind.retryable and kind.status in (429, 503)} >= {
        "OverloadedError",
        "ExpertsUnavailableError",
    }
    assert not any(kind.retryable for kind in EVERY if issubclass(kind, RequestError))
