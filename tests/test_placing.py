"""Which rows a process holds, and global arrays from them; what several processes add is in tests/test_hosts.py."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparsecut_jax.runtime import sharding
from sparsecut_jax.runtime.placing import fetch, gather, place, rows_here

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


class Elsewhere:
    """A sharding of which this process has only some devices."""

    def __init__(self, placed: NamedSharding, devices: list[int]):
        self.placed, self.devices = placed, devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        found = self.placed.addressable_devices_indices_map(shape)
        return {device: index for device, index in found.items() if device.id in self.devices}


@pytest.mark.parametrize(
    ("devices", "rows"),
    [
        (range(8), [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 1], [0, 1]),  # two of the tensor axis hold the same rows
        ([2, 3], [2, 3]),
        ([1, 4], [0, 1, 4, 5]),  # of two processes that do not hold neighbours
        ([0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6, 7]),  # tensor runs across processes: each has all rows
        ([7], [6, 7]),
    ],
)
def test_rows_here(devices, rows):
    placed = sharding.batch_sharding(sharding.make_mesh(SHAPE))
    assert rows_here(Elsewhere(placed, list(devices)), 8).tolist() == rows


@pytest.mark.parametrize("sizes", [SHAPE, {"data": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}])
def test_place_and_fetch(sizes):
    placed = sharding.batch_sharding(sharding.make_mesh(sizes))
    tree = {"a": np.arange(24).reshape(8, 3), "b": None, "c": np.arange(8, dtype=np.uint8)}
    found = place(tree, placed, rows_here(placed, 8), 8)
    assert found["b"] is None and found["c"].dtype == np.uint8
    for name in ("a", "c"):
        assert found[name].sharding.is_equivalent_to(placed, found[name].ndim)
        np.testing.assert_array_equal(fetch(found[name]), tree[name])


def test_place_takes_the_rows_that_a_device_holds():
    """Rows 0, 1, 4 and 5 of eight: those of device 4 are the last two of what the process has."""
    mesh = sharding.make_mesh(SHAPE)
    asked = []

    def make(shape, placed, block):
        asked.extend(block((slice(start, start + 2), slice(None))).tolist() for start in (0, 4))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", make)
        place(np.array([[0], [1], [4], [5]]), sharding.batch_sharding(mesh), np.array([0, 1, 4, 5]), 8)
    assert asked == [[[0], [1]], [[4], [5]]]


def test_fetch_of_what_is_whole_everywhere():
    whole = jax.device_put(np.arange(3), NamedSharding(sharding.make_mesh(SHAPE), PartitionSpec()))
    assert fetch(whole).tolist() == [0, 1, 2]


def test_gather_in_one_process():
    assert gather(np.array([1, 2])).tolist() == [[1, 2]]
