"""Bytes that compilers report for the real step, beside which the analytic model is held (test_planning_memory.py).

Recorded with jax 0.10.2 by

    python tests/planning_cases.py cpu
    python tests/planning_cases.py gpu        # where jax[cuda13] is installed; no GPU is needed

which write (arguments, temporaries) of every case into planning_bytes.json. XLA compiles for a described H100 as well as
for one that is there; autotuning, which needs the chip, is off, and so is Triton's GEMM, which does not compile every
size without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before JAX looks for devices
    sys.path[:0] = [
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        os.path.dirname(os.path.abspath(__file__)),
    ]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=64 --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        if sys.argv[1:2] == ["gpu"]
        else "--xla_force_host_platform_device_count=64"
    )

import jax

from planning_configs import load
from sparsecut_jax.planning.compiling import lower_step
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.settings import Config

BYTES = Path(__file__).with_name("planning_bytes.json")
SEVEN, THIRTEEN, QWEN = (
    ("sparsecut", "size=7b,stage={}"),
    ("sparsecut", "size=13b,stage={}"),
    ("siglip_qwen", "stage={}"),
)
LLAVA, BASE = ("llava", "size={}b,stage=finetune"), ("base", "")
SMOL = dict(  # SmolLM2-135M behind a small tower
    llm__width=576, llm__layers=30, llm__heads=9, llm__kv_heads=3, llm__head_dim=64, llm__mlp_dim=1536,
    llm__vocab_size=49152, llm__tie_embeddings=True, llm__remat="auto", vision__remat="auto", vision__image_size=56,
    vision__patch_size=14, vision__width=384, vision__layers=12, vision__heads=6, vision__mlp_dim=1536,
    shortcuts__count=4,
)  # fmt: skip
SMALL = dict(llm__vocab_size=512)
LEAVE_TOWER = dict(stage__trainable=("fusion/.*", "llm/.*"))
REST = dict(stage__buckets=())


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on so many devices, and whether constants were fitted to it."""

    config: tuple[str, str]
    devices: int
    fitted: bool
    changes: dict[str, Any]

    def load(self, platform: str) -> tuple[Config, str, dict[str, int]]:
        """(resolved config, stage, mesh sizes)."""
        cfg, stage = load(*self.config, **self.changes)
        sizes = sharding.mesh_sizes(dataclasses.asdict(cfg.mesh), self.devices, platform)
        return backends.resolve(cfg, platform), stage, sizes


def case(config: tuple[str, str], devices: int, fitted: bool, **changes: Any) -> Case:
    return Case(config, devices, fitted, changes)


def of(config: tuple[str, str], *arguments: str) -> tuple[str, str]:
    return config[0], config[1].format(*arguments)


CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        # fitted
        "captions": case(BASE, 1, True, **SMALL, stage__seq_len=24),
        "all trained": case(BASE, 1, True, **SMOL, stage__seq_len=512, stage__batch_size=4),
        "full": case(BASE, 1, True, **{**SMOL, "llm__remat": "full"}, stage__seq_len=512, stage__batch_size=16),
        "mlp": case(
            BASE,
            1,
            True,
            **SMOL,
            **LEAVE_TOWER,
            fusion__name="mlp",
            shortcuts__density="none",
            stage__seq_len=256,
            stage__batch_size=32,
        ),
        # held out
        "base": case(BASE, 1, False, **SMALL),
        "base on eight": case(BASE, 8, False, **SMALL),
        "long": case(BASE, 1, False, **SMALL, stage__seq_len=1024, llm__remat="none", vision__remat="none"),
        "fsdp": case(BASE, 8, False, **SMOL, mesh__data=1, mesh__fsdp=8, stage__seq_len=512, stage__batch_size=16),
        "turns": case(BASE, 1, False, **SMOL, stage__seq_len=512, stage__batch_size=16, stage__accumulate=4),
        "adapters": case(
            BASE,
            1,
            False,
            **SMOL,
            lora__rank=16,
            stage__trainable=("fusion/.*", ".*lora_[ab]"),
            stage__seq_len=256,
            stage__batch_size=16,
        ),
        "cross attention": case(
            BASE,
            1,
            False,
            **SMOL,
            **LEAVE_TOWER,
            fusion__name="cross_attention",
            stage__seq_len=256,
            stage__batch_size=8,
        ),
        "large views": case(
            BASE, 1, False, **{**SMOL, "vision__image_size": 224}, stage__seq_len=512, stage__batch_size=2
        ),
        "tensor": case(BASE, 8, False, **SMALL, mesh__data=4, mesh__tensor=2, stage__seq_len=256),
    },
    "gpu": {
        # fitted
        "7b": case(of(SEVEN, "finetune"), 8, True, stage__batch_size=8, **REST),
        "7b, 4 rows": case(of(SEVEN, "finetune"), 8, True, stage__batch_size=32, **REST),
        "qwen, 4 rows": case(of(QWEN, "finetune"), 8, True, stage__batch_size=32, **REST),
        "qwen, two copies": case(
            of(QWEN, "finetune"), 8, True, stage__batch_size=16, mesh__data=2, mesh__fsdp=4, **REST
        ),
        "qwen, captions, one copy each": case(
            of(QWEN, "pretrain"), 8, True, stage__batch_size=32, mesh__data=8, mesh__fsdp=1, **REST
        ),
        # held out
        "7b on 64": case(of(SEVEN, "finetune"), 64, False, stage__batch_size=128, **REST),
        "7b, tensor": case(of(SEVEN, "finetune"), 8, False, stage__batch_size=8, mesh__fsdp=4, mesh__tensor=2, **REST),
        "7b, turns": case(of(SEVEN, "finetune"), 8, False, stage__batch_size=32, stage__accumulate=4, **REST),
        "7b, captions": case(of(SEVEN, "pretrain"), 8, False, stage__batch_size=64, **REST),
        "7b, adapters": case(of(SEVEN, "lora"), 8, False, stage__batch_size=16, **REST),
        "7b, short": case(of(SEVEN, "finetune"), 8, False, stage__batch_size=32, stage__seq_len=1024, **REST),
        "7b, cross attention": case(
            of(SEVEN, "finetune"), 8, False, stage__batch_size=16, fusion__name="cross_attention", **REST
        ),
        "13b": case(of(THIRTEEN, "finetune"), 16, False, stage__batch_size=16, **REST),
        "llava 13b": case(of(LLAVA, "13"), 16, False, stage__batch_size=64, **REST),
        "qwen, dots": case(of(QWEN, "finetune"), 8, False, stage__batch_size=16, llm__remat="dots", **REST),
        "qwen, none": case(of(QWEN, "finetune"), 8, False, stage__batch_size=8, llm__remat="none", **REST),
    },
}


def devices(platform: str, count: int) -> list[Any]:
    if platform == "cpu":
        return jax.devices()[:count]
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    fused_attention_stablehlo.check_compute_capability = lambda capability: True  # it asks the GPU that is there
    return list(
        topologies.get_topology_desc(
            "", platform="cuda", target_config=H100, topology=f"1x1x{count}"
        ).devices
    )  # fmt: skip


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(platform: str, wanted: list[str]) -> None:
    """Records all cases of a platform, or those that are `wanted`."""
    for name, case in CASES[platform].items():
        if wanted and name not in wanted:
            continue
        cfg, stage, _ = case.load(platform)
        found = lower_step(cfg, stage, devices(platform, case.devices)).compile().memory_analysis()
        recorded = json.loads(BYTES.read_text()) if BYTES.exists() else {}
        recorded.setdefault(platform, {})[name] = [found.argument_size_in_bytes, found.temp_size_in_bytes]
        BYTES.write_text(json.dumps(recorded, indent=1) + "\n")
        print(platform, name, recorded[platform][name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
