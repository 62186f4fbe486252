"""Topologies: what their names mean, and what is said of those that do not exist."""

import pytest

from sparsecut_jax.runtime.hardware import CHIPS, GIB, larger, parse, peak_flops
from tiny import refusal


@pytest.mark.parametrize(
    "text, chips, shape, slices, shown",
    [
        ("v5e:8x8", 64, (8, 8), 1, "v5e:8x8"),
        ("V5E:1x1", 1, (1, 1), 1, "v5e:1x1"),
        ("2*v5e:16x16", 512, (16, 16), 2, "2*v5e:16x16"),
        ("v5p:4x4x8", 128, (4, 4, 8), 1, "v5p:4x4x8"),
        ("h100:8", 8, (8,), 1, "h100:8"),
        ("h100:3", 3, (3,), 1, "h100:3"),
        ("h100:16", 16, (8,), 2, "h100:16"),
        ("cpu:8", 8, (8,), 1, "cpu:8"),
    ],
)
def test_parse(text, chips, shape, slices, shown):
    topology = parse(text)
    assert (topology.chips, topology.shape, topology.slices, topology.text) == (chips, shape, slices, shown)


KNOWN = "known: v5e, v5p, v6e, h100, h200, cpu; for example v5e:8x8, 2*v5e:16x16, v5p:4x4x4, h100:8 or cpu:8"
SHAPES = "expected one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("v7:8x8", f"--topology='v7:8x8': unknown kind 'v7'; {KNOWN}"),
        ("h10:8", f"--topology='h10:8': unknown kind 'h10'; did you mean 'h100'?; {KNOWN}"),
        ("8x8", f"--topology='8x8': unknown kind '8x8'; {KNOWN}"),
        (
            "",
            "--topology is missing; for example --topology=v5e:8x8; known kinds: v5e, v5p, v6e, h100, h200, cpu",
        ),
        ("v5e", f"--topology='v5e': v5e has no slice ''; {SHAPES}"),
        ("v5e:8x4", f"--topology='v5e:8x4': v5e has no slice '8x4'; did you mean '4x8'?; {SHAPES}"),
        ("v5e:64", f"--topology='v5e:64': v5e has no slice '64'; {SHAPES}"),
        ("0*v5e:8x8", "--topology='0*v5e:8x8': expected 1 to 256 slices; for example 2*v5e:8x8"),
        (
            "h100:12",
            "--topology='h100:12': expected h100:N for N devices, up to 8 or a multiple of it (whole nodes); for example h100:8",
        ),
        (
            "2*h100:8",
            "--topology='2*h100:8': expected h100:N for N devices, up to 8 or a multiple of it (whole nodes); only TPUs take a number of slices (2*); for example h100:8",
        ),
        (
            "h100:0",
            "--topology='h100:0': expected h100:N for N devices, up to 8 or a multiple of it (whole nodes); for example h100:8",
        ),
        ("cpu:many", "--topology='cpu:many': expected cpu:N for N devices; for example cpu:8"),
    ],
)
def test_refusals(text, sentence):
    assert refusal(parse, text) == sentence


def test_rates():
    """As the vendors state them: TFLOP/s of bf16, GB/s, and the memory that a program may use."""
    rates = {name: (chip.flops / 1e12, chip.bandwidth / 1e9, chip.memory / GIB) for name, chip in CHIPS.items()}
    assert rates == {
        "v5e": (197, 819, 15.75),
        "v5p": (459, 2765, 95.74),
        "v6e": (918, 1638, 31.25),
        "h100": (989, 3350, 80e9 / GIB),
        "h200": (989, 4800, 141e9 / GIB),
        "cpu": (0, 0, 0),
    }


def test_cpu_devices_share_the_memory_of_the_machine():
    assert parse("cpu:2").memory == pytest.approx(4 * parse("cpu:8").memory)


def test_larger():
    assert [topology.text for topology in larger(parse("v5e:8x16"))] == [
        "v5e:16x16", "2*v5e:16x16", "4*v5e:16x16", "8*v5e:16x16",
    ]  # fmt: skip
    assert [topology.text for topology in larger(parse("h100:8"))][:2] == ["h100:16", "h100:32"]
    assert larger(parse("cpu:8")) == []


@pytest.mark.parametrize(
    "name, tera",
    [
        ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("cpu", 0), ("NVIDIA A100-SXM4-40GB", 0),
    ],
)  # fmt: skip
def test_peak_of_a_device_by_its_name(name, tera):
    assert peak_flops(name) == tera * 1e12
