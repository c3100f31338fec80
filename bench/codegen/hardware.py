"""What one multiprocessor of each NVIDIA GPU can do per clock: the rates behind every bound.

Sources: [D] documented: the CUDA C++ Programming Guide (throughput of native arithmetic instructions; technical
specifications per compute capability), NVIDIA's architecture whitepapers, the PTX ISA; [M] published microbenchmarks;
[A] an assumption of ours.

* tensor: dense bf16 multiply-adds. sm_80 1024, sm_90 2048 with warpgroup MMA, sm_100 4096 with tcgen05 [D];
  warp-level MMA reaches 0.629 of that on sm_90 (arXiv:2402.13499) [M] and a quarter on sm_100 [A];
  sm_86/89/120 512 [D], professional parts. FP8 doubles the rate, TF32 halves it.
* fp32: adds, multiplies, fused multiply-adds [D]. int: 64 logic, compare, shift, select and integer operations [D].
* special: 16 exp2, reciprocal, square root, sine and type conversions [D].
* shared: 128 bytes [D]. l2: 64 bytes from L2 per multiprocessor [D for sm_80, A for the others].
* dram: peak bandwidth ÷ multiprocessors ÷ boost clock [D].
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """Rates are per clock; bytes for memories, operations for pipes. `clock_ghz` is the boost clock."""

    tensor: int
    warp_level_share: float
    fp32: int
    dram: float
    clock_ghz: float
    max_warps: int
    max_blocks: int
    shared_total: int
    integer: int = 64
    special: int = 16
    shared: int = 128
    l2: int = 64
    fp64: int = 2
    registers: int = 65536
    reserved_shared_per_block: int = KIB


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(1024, 1.0, 64, 13.4, 1.41, 64, 32, 164 * KIB, fp64=32),
    "sm_86": Multiprocessor(512, 1.0, 128, 4.7, 1.80, 48, 16, 100 * KIB),
    "sm_89": Multiprocessor(512, 1.0, 128, 3.6, 2.52, 48, 24, 100 * KIB),
    "sm_90": Multiprocessor(2048, 0.629, 128, 14.5, 1.755, 64, 32, 228 * KIB, fp64=64),
    "sm_100": Multiprocessor(4096, 0.25, 128, 29.0, 1.85, 64, 32, 228 * KIB, fp64=64),
    "sm_120": Multiprocessor(512, 1.0, 128, 4.4, 2.41, 48, 24, 100 * KIB),
}
