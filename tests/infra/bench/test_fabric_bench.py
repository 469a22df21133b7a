"""The floor carries what it says, and what stands beside the fabric computes the same; no speed is looked at."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from infra.bench.expert_processes import EXPERTS
from infra.bench.fabric import combine, layer_input, pack
from infra.bench.floor import Echo, Floor
from infra.bench.transports import crossover_bytes


def test_the_floor_carries_every_size_and_may_leave_a_group_out(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(3)]
    for path in paths:
        Echo(path)
    with Floor(paths) as floor:
        for sizes in ([1, 5000, 0], [1 << 20, 3, 70_000]):
            floor.start(sizes, calls=3)
            for _ in range(3):
                floor.ping_pong()


def test_the_floor_brings_back_what_it_took(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    Echo(path)
    with Floor([path]) as floor:
        floor.start([70_000], calls=1)
        _, there, back, _ = floor._ways[0]
        there[:] = bytes(number % 251 for number in range(70_000))
        floor.ping_pong()
        assert back == there


def test_a_floor_whose_echo_does_not_listen_is_refused(tmp_path: Path) -> None:
    Echo(str(tmp_path / "there"))
    with pytest.raises(FileNotFoundError):
        Floor([str(tmp_path / "there"), str(tmp_path / "missing")])


def test_echoes_end_with_their_client(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    path = str(tmp_path / "f")
    Echo(path)
    (echo,) = set(threading.enumerate()) - before
    with Floor([path]) as floor:
        floor.start([64], calls=1)
        floor.ping_pong()
        assert echo.is_alive()
    echo.join(5)
    assert not echo.is_alive()


def test_plain_pack_and_combine_weight_and_sum_what_the_experts_were_given() -> None:
    given = layer_input(40, 0)
    order, counts, rows = pack(given)
    experts = given.index.reshape(-1)[order]
    assert experts.tolist() == sorted(experts.tolist())
    assert counts.tolist() == [int((given.index == expert).sum()) for expert in range(EXPERTS)]
    torch.testing.assert_close(
        combine(rows, order, given.weight), given.hidden * given.weight.sum(1, keepdim=True), rtol=1e-5, atol=1e-6
    )


def test_the_crossover_lies_between_the_sizes_by_proportion_of_logarithms() -> None:
    assert crossover_bytes([(1 << 10, 4.0), (1 << 20, 2.0), (4 << 20, 0.5)]) == pytest.approx(2 << 20)


@pytest.mark.parametrize(
    "points", [[(1, 2.0), (2, 1.5)], [(1, 0.9), (2, 0.5)], [(1, 2.0), (2, 0.5), (4, 1.5)], [(1, 2.0)]]
)
def test_there_is_no_crossover_where_one_is_always_faster_or_the_stream_is_in_the_end(
    points: list[tuple[int, float]],
) -> None:
    assert crossover_bytes(points) is None


def test_a_size_at_which_the_store_happened_to_win_is_no_crossover() -> None:
    assert crossover_bytes([(1, 0.9), (2, 1.1), (8, 1 / 1.1)]) == pytest.approx(4)
