"""A little of every target, the same each time; what is found by `tox -e fuzz` is tried here from then on."""

import pytest

from fuzz.targets import TARGETS, try_case

SEED = 1
CASES = {"http1": 1000, "http2": 300, "bodies": 500, "backend": 300}

# Seeds, targets and cases that went wrong once.
FOUND = [
    (1, "backend", 786),  # a media type that is not UTF-8
]


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_goes_wrong(name: str) -> None:
    target = TARGETS[name]()
    for number in range(CASES[name]):
        try_case(target, name, SEED, number)


@pytest.mark.parametrize(("seed", "name", "number"), FOUND)
def test_what_went_wrong_once(seed: int, name: str, number: int) -> None:
    try_case(TARGETS[name](), name, seed, number)
