"""What still holds a device although nobody asks for it any more."""

from __future__ import annotations

from autoscale.leaving import MARGIN_S, Leaving


def test_a_replica_taken_back_holds_its_device_until_details_asked_well_after_do_not_show_it():
    leaving = Leaving()
    leaving.taken_back("experts-0", 2, now=10.0)
    assert leaving.count("experts-0") == 2
    leaving.details({"experts-0": 0}, asked_at=10.0 + MARGIN_S / 2)
    assert leaving.count("experts-0") == 2, "Serve may not have acted on it yet"
    leaving.details({"experts-0": 2}, asked_at=10.0 + 2 * MARGIN_S)
    assert leaving.count("experts-0") == 2
    assert leaving.any
    leaving.details({"experts-0": 0}, asked_at=10.0 + 3 * MARGIN_S)
    assert leaving.count("experts-0") == 0
    assert not leaving.any


def test_details_that_do_not_know_of_it_yet_are_added_to():
    leaving = Leaving()
    leaving.details({"experts-0": 1}, asked_at=5.0)
    leaving.taken_back("experts-0", 1, now=6.0)
    leaving.taken_back("experts-1", 3, now=6.0)
    assert leaving.count("experts-0") == 2
    assert leaving.count("experts-1") == 3
    assert leaving.count("experts-2") == 0


def test_a_clock_that_jumps_back_frees_nothing_too_soon():
    leaving = Leaving()
    leaving.taken_back("experts-0", 1, now=1000.0)
    leaving.details({}, asked_at=3.0)
    assert leaving.count("experts-0") == 1
