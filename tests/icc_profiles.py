"""ICC profiles by hand, from the numbers that their standards publish."""

import struct

import numpy as np

# Columns: XYZ of the primaries, adapted to D50 (ICC's profile connection space).
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
D50 = (0.9642, 1.0, 0.8249)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def gamma(value: float) -> bytes:
    """A curve: a power."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def srgb_curve() -> bytes:
    """sRGB's curve by its formula."""
    return (
        b"para\0\0\0\0"
        + struct.pack(">HH", 3, 0)
        + b"".join(map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    )


def srgb_table(size: int = 1024) -> bytes:
    """sRGB's curve as a table, as the profile of 1998 that most files hold."""
    x = np.linspace(0, 1, size)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", size) + (linear * 65535).round().astype(">u2").tobytes()


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    text = b"made by hand\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": _xyz(D50),
        b"cprt": b"text\0\0\0\0" + text, **tags,
    }  # fmt: skip
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s12s4s", 128 + len(table) + len(data), b"\0\0\0\0", 0x02400000, kind, space, connection,
                         struct.pack(">6H", 2026, 11, 30, 0, 0, 0), b"acsp")  # fmt: skip
    header += bytes(28) + b"".join(map(_fixed, D50))
    return header + bytes(128 - len(header)) + table + data


def rgb_profile(primaries: tuple, curve: bytes) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ"), (b"rTRC", b"gTRC", b"bTRC")
    columns = dict(zip(names[0], map(_xyz, primaries), strict=True))
    return _profile(b"RGB ", b"XYZ ", columns | dict.fromkeys(names[1], curve))


def grey_profile(curve: bytes) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": curve})


def cmyk_profile(corners: dict[tuple[int, int, int, int], tuple[float, float, float]]) -> bytes:
    """A table of the 16 corners: (C, M, Y, K), each 0 or 1, -> Lab; black where nothing is given."""
    table = b""
    for i in range(16):
        lightness, a, b = corners.get((i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1), (0, 0, 0))
        table += bytes([round(lightness * 2.55), round(a) + 128, round(b) + 128])
    ramp = bytes(range(256))
    unit = b"".join(_fixed(float(i % 4 == 0)) for i in range(9))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, b"prtr")
