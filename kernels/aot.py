"""Ahead-of-time compilation of every Triton kernel for GPUs that are not here, with the resources each one takes.

Invariant: what is compiled is what would be launched: the same constants, warps, stages and pointer alignment. A kernel
imported for the interpreter cannot be compiled, so `table` compiles in processes of its own, without TRITON_INTERPRET.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from kernels.dispatch import warps

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OPS = ("hstu_attention", "hstu_attention_cached", "norm_gate", "uvqk", "sampled_softmax", "rowwise_adamw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One specialisation of a kernel. `signature`: argument -> Triton type ("*bf16", "i32", "constexpr")."""

    kernel: str
    label: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    may_spill: bool = False
    aligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one multiprocessor holds: warps (in four parts, each with its registers), blocks, shared memory."""

    warps: int
    blocks: int
    registers: int
    register_unit: int
    shared_bytes: int
    block_shared_bytes: int
    reserved_bytes: int


PARTS = 4
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and its occupancy calculator: registers
# are given to a warp in units of 256, each block reserves 1 KB. AMD: CDNA3 instruction set manual: 512 registers a lane
# and SIMD in units of 8 (times 64 lanes), 8 waves a SIMD, 64 KB.
LIMITS = {
    "sm_80": Limits(
        warps=64,
        blocks=32,
        registers=16384,
        register_unit=256,
        shared_bytes=164 << 10,
        block_shared_bytes=163 << 10,
        reserved_bytes=1 << 10,
    ),
    "sm_90": Limits(
        warps=64,
        blocks=32,
        registers=16384,
        register_unit=256,
        shared_bytes=228 << 10,
        block_shared_bytes=227 << 10,
        reserved_bytes=1 << 10,
    ),
    "gfx942": Limits(
        warps=32,
        blocks=32,
        registers=512 * 64,
        register_unit=8 * 64,
        shared_bytes=64 << 10,
        block_shared_bytes=64 << 10,
        reserved_bytes=0,
    ),
}
LIMITS["sm_100"] = LIMITS["sm_90"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one compiled kernel takes: registers a thread, spilled bytes a thread, shared memory bytes a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def occupancy(resources: Resources, num_warps: int, target: str) -> float:
    """Return the share of a multiprocessor's warps that are resident at once, 0.0 if not even one block fits."""
    limits = LIMITS[target]
    warp_registers = _rounded_up(resources.registers * TARGETS[target][2], limits.register_unit)
    by_registers = PARTS * (limits.registers // max(1, warp_registers)) // num_warps
    by_shared = limits.shared_bytes // max(1, _rounded_up(resources.shared_bytes + limits.reserved_bytes, 128))
    blocks = min(limits.blocks, limits.warps // num_warps, by_registers, by_shared)
    return blocks * num_warps / limits.warps


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def available_ops() -> list[str]:
    """Return the names in OPS whose kernels exist."""
    return [op for op in OPS if (Path(__file__).parent / op / "triton.py").is_file()]


def variants(op: str) -> list[Variant]:
    """Return the specialisations of an op that are compiled ahead of time."""
    found: list[Variant] = import_module(f"kernels.{op}.triton").aot_variants()
    return found


def table(
    targets: Sequence[str] = tuple(TARGETS),
    *,
    ops: Sequence[str] | None = None,
    num_processes: int = 2,
    spilling: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Compile every variant for every target; return one benchmark row each: {name, value, unit, against, target, ...}.

    The value is the bytes spilled a thread, bound by 0 on NVIDIA where the variant must not spill; `spilling=False`
    leaves out those that may. Further keys: op, kernel, label, arch, num_warps, registers, shared_bytes, occupancy.
    Raises RuntimeError naming a variant that does not compile or fit.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_leave_interpreter) as pool:
        jobs = [
            (op, place, target)
            for op, may_spill in pool.map(_may_spill, available_ops() if ops is None else ops)
            for place, may in enumerate(may_spill)
            if spilling or not may
            for target in targets
        ]
        running = {pool.submit(_row, *job): job for job in jobs}
        found = {}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                found[running[future]] = future.result()
                on_progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[job] for job in jobs]


def _leave_interpreter() -> None:
    """Set up a compiling process: kernels that are imported from here on are real ones."""
    os.environ.pop("TRITON_INTERPRET", None)


def _may_spill(op: str) -> tuple[str, list[bool]]:
    return op, [variant.may_spill for variant in variants(op)]


def _row(op: str, place: int, target: str) -> dict[str, Any]:
    variant = variants(op)[place]
    name = f"{op}, {variant.kernel}, {variant.label}, {target}"
    try:
        resources = compile_variant(variant, target)
    except Exception as error:
        # The compiler's own errors do not survive the way between processes.
        raise RuntimeError(f"{name} does not compile: {type(error).__name__}: {str(error)[-500:]}") from None
    must_not_spill = target.startswith("sm_") and not variant.may_spill
    return {
        "name": name,
        "value": resources.spilled_bytes,
        "unit": "bytes spilled",
        "against": None,
        "target": 0 if must_not_spill else None,
        "at_most": True,
        "op": op,
        "kernel": variant.kernel,
        "label": variant.label,
        "arch": target,
        "num_warps": warps(variant.num_warps, amd=TARGETS[target][0] == "hip"),
        "registers": resources.registers,
        "shared_bytes": resources.shared_bytes,
        "occupancy": occupancy(resources, warps(variant.num_warps, amd=TARGETS[target][0] == "hip"), target),
    }


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile for one of TARGETS and return what the kernel takes.

    Raises RuntimeError if it does not assemble, or takes more shared memory than a block can have.
    """
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size = TARGETS[target]
    names = list(variant.fn.arg_names)
    aligned = [n for n, kind in variant.signature.items() if kind.startswith("*")] + list(variant.aligned)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constexprs = dict(variant.constexprs)
    if backend == "hip" and constexprs.get("PRECISION") == "tf32x3":
        # IEEE products are all that AMD's fp32 matrix units offer; the launchers choose alike.
        constexprs["PRECISION"] = "ieee"
    source = ASTSource(variant.fn, variant.signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps(variant.num_warps, amd=backend == "hip"), "num_stages": variant.num_stages}
    compiled = triton_compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    shared, most = int(compiled.metadata.shared), LIMITS[target].block_shared_bytes
    if shared > most:
        raise RuntimeError(f"a block takes {shared:,} bytes of shared memory, {target} has {most:,}")
    if backend == "hip":
        registers, spilled = _amd_registers(compiled.asm["amdgcn"])
    else:
        registers, spilled = _nvidia_registers(compiled.asm["ptx"], target)
    return Resources(registers=registers, spilled_bytes=spilled, shared_bytes=shared)


def _nvidia_registers(ptx: str, target: str) -> tuple[int, int]:
    """Return registers and spilled bytes as the wheel's own assembler reports them."""
    import triton.backends.nvidia as nvidia

    number = int(target.removeprefix("sm_"))
    tool = Path(nvidia.__file__).parent / "bin" / ("ptxas-blackwell" if number >= 100 else "ptxas")
    gpu = target if number < 90 else f"{target}a"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [str(tool), "-v", f"--gpu-name={gpu}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses the kernel for {target}: {done.stderr.strip()[-500:]}")
    report = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers for {target}: {report.strip()[-500:]}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(registers[1]), max(map(int, spills), default=0)


def _amd_registers(assembly: str) -> tuple[int, int]:
    """Return vector registers and spilled bytes from the kernel's metadata."""
    counts = {name: int(value) for name, value in re.findall(r"\.(\w*vgpr\w*):\s+(\d+)", assembly)}
    return counts["vgpr_count"], 4 * counts.get("vgpr_spill_count", 0)
