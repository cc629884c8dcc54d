"""What accelerators can do, by their makers' figures: the one table that utilisation and plans are measured against."""

import dataclasses
import math
import re

from llm_jax.errors import UserError, choose

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; its figures are those of the data sheet, in bytes and seconds."""

    platform: str
    """tpu or gpu"""
    kinds: tuple[str, ...]
    """how jax begins the name of such a device (`device_kind`)"""
    flops: float
    """dense bfloat16 operations a second (V100: float16)"""
    memory: float
    """bytes of its memory that a program may fill"""
    bandwidth: float
    """bytes a second between it and its memory"""
    interconnect: float
    """bytes a second that it can send to others of its slice or node, over all links, while it receives as many"""
    network: float
    """its share of the bytes a second that its host can send to other slices or nodes"""


# TPU: "System architecture" of each version in the documentation of Google Cloud TPU, where bandwidth between chips is given in Gbit/s a
# chip (v4 2400, v5e 1600, v5p 4800, v6e 3584); memory is what libtpu names when it refuses a program that is too large (15.75G of 16 on v5e).
# Network: data center bandwidth of a pod over its chips (v5e 6.4 Tbit/s, v6e 25.6 Tbit/s over 256) or of a chip (v5p 50 Gbit/s); of v4 what
# PaLM's pods of 3,072 chips reached (81 Tbit/s; Chowdhery et al. 2022, section 4). GPU: a NIC for each in NVIDIA's DGX, 400 Gbit/s from H100 on,
# 200 of A100, four of 100 for eight V100; L4 a share of the 100 Gbit/s of Google's machines of eight.
# GPU: NVIDIA's data sheets of the SXM forms (A100 80GB, H100, H200, B200, V100 32GB) and of L4; NVLink in one direction, half of what is
# stated for both, and it joins the GPUs of one node. B200: the share of a GPU in an HGX board. L4 has PCIe alone.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", ("TPU v4",), 275e12, 30.75 * GIB, 1228e9, 300e9, 3.3e9),
    "v5e": Chip("tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
    "v5p": Chip("tpu", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1638e9, 448e9, 12.5e9),
    "a100": Chip("gpu", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 25e9),
    "h100": Chip("gpu", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip("gpu", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 50e9),
    "b200": Chip("gpu", ("NVIDIA B200",), 2250e12, 180e9, 7700e9, 900e9, 50e9),
    "l4": Chip("gpu", ("NVIDIA L4",), 121e12, 24e9, 300e9, 32e9, 1.5e9),
    "v100": Chip("gpu", ("Tesla V100",), 125e12, 32e9, 900e9, 150e9, 6.25e9),
}
"""By the name that a topology begins with, as in v5e:16x16 or h100:8"""


def of_kind(kind: str) -> Chip | None:
    """The chip of a device by what jax calls it; the longest name that it begins with counts.

    >>> of_kind("TPU v5 lite") is CHIPS["v5e"], of_kind("TPU v99")
    (True, None)
    """
    found = [
        (len(name), i)
        for i, chip in enumerate(CHIPS.values())
        for name in chip.kinds
        if kind.lower().startswith(name.lower())
    ]
    return list(CHIPS.values())[max(found)[1]] if found else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind, and how they are connected."""

    name: str
    chip: Chip
    chips: int
    """in all slices"""
    slices: int = 1
    """TPU slices or GPU nodes that only the data center's network joins"""

    @property
    def slice(self) -> str:
        """The name of one of its slices.

        >>> read_topology("2xv5e:4x4").slice
        'v5e:4x4'
        """
        return re.sub(r"^\d+x", "", self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the network of one of its slices.

        >>> read_topology("2xv5e:4x8").shape
        (4, 8)
        """
        return tuple(int(n) for n in self.slice.split(":")[1].split("x"))


def read_topology(name: str) -> Topology:
    """The chips that a name such as v5e:16x16, v5p:4x4x4, h100:8 or, for two slices, 2xv5e:16x16 stands for.

    Raises:
        UserError: no such chip, or another number of axes than its network has.

    >>> read_topology("v5e:4x4").chips, read_topology("3xv5e:4x4").chips
    (16, 48)
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise UserError(f"topology {name!r}: say a chip and how many, e.g. v5e:16x16, v5p:4x4x4 or h100:8")
    chip = CHIPS[choose("chip", found[2], CHIPS, UserError)]
    sizes = [int(n) for n in found[3].split("x")]
    axes = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}.get(found[2], 1)
    if len(sizes) != axes or min(sizes) < 1:
        example = found[2] + ":" + {3: "4x4x4", 2: "4x4", 1: "8"}[axes]
        raise UserError(f"topology {name!r}: {found[2]} is given by {axes} sizes of at least 1, e.g. {example}")
    slices = int(found[1] or 1)
    return Topology(name, chip, slices * math.prod(sizes), slices)
