"""How programs walk their rows, by kernel, shape, dtype and architecture. Each row says what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ce_kernels.launch import Problem


@dataclass(frozen=True)
class Config:
    """How a program walks a row: columns of 2-byte elements a step, warps that share them, multiprocessors a program.

    unroll: steps in flight together. backwards: the fused kernel's second pass meets first what the first pass read
    last. max_registers: a thread's, so that more programs share a multiprocessor.
    steps: after so many, another program goes on with the row; None: each has a row to itself.
    rows: how many rows a program of `ce_kernels.tiles` takes side by side; 0: the row kernels. row_a_thread: each of
    its threads reads whole rows for their statistics.
    """

    block: int
    num_warps: int
    num_ctas: int = 1
    num_stages: int = 1
    unroll: int = 1
    backwards: bool = False
    max_registers: int | None = None
    steps: int | None = None
    rows: int = 0
    row_a_thread: bool = False


# (longest row in bytes, configuration); behind each row the kernel's time as a multiple of copying the logits once.
# NVIDIA H200, bf16, Triton 3.9, torch 2.11, November 2026: the best of sweeps as `python -m benchmarks tune` makes.
# Where two follow each other, the second is in place: the gradient over the logits.
LONGEST = (None, Config(16384, 32, unroll=3, backwards=True, max_registers=32))  # 4096×128256 with a soft cap: 1.88
SHORT = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 1.08, 1.10
    (2 * 1280, Config(512, 1, unroll=2, backwards=True, max_registers=40)),  # 223232×1200: 1.11, 1.19
    (2 * 1792, Config(512, 1, unroll=3, backwards=True)),  # 174080×1536: 1.02, 1.03
)
FUSED = (
    *SHORT,
    (2 * 2816, Config(1024, 2, unroll=2)),  # 65536×2048: 1.03; 104448×2560: 1.03
    (2 * 3840, Config(1024, 4, unroll=3, backwards=True, max_registers=32)),  # 87040×3072: 1.01; 74752×3584: 1.01
    (2 * 5632, Config(2048, 4, unroll=2)),  # 32768×4096: 1.02; 52224×5120: 1.01
    (2 * 7680, Config(1024, 4, unroll=3, backwards=True, max_registers=40)),  # 43008×6144: 1.01; 36864×7168: 1.01
    (2 * 11264, Config(4096, 8, unroll=2)),  # 16384×8192: 1.01; 25600×10240: 1.01
    (2 * 15360, Config(2048, 8, unroll=3, backwards=True, max_registers=40)),  # 21504×12288: 1.00; 18432×14336: 1.01
    (2 * 17408, Config(4096, 8, unroll=2, backwards=True)),  # 16384×16384: 1.02
    (2 * 19456, Config(4096, 16, unroll=4, backwards=True, max_registers=32)),  # 14336×18432: 1.04
    (2 * 23552, Config(4096, 16, unroll=3, backwards=True, max_registers=32)),  # 12288×20480: 1.00; 11264×22528: 1.03
    # 10240×24576: 1.03; 9216×28672: 1.03; 8192×32000: 1.03. With JAX's labels of 4 bytes it would take 44 registers.
    (2 * 34816, Config(8192, 16, unroll=3, backwards=True, max_registers=40)),
    (2 * 38912, Config(8192, 16, unroll=4, backwards=True, max_registers=40)),  # 7168×36864: 1.03
    # 6144×40960: 1.06; 5120×45056: 1.09; 8192×50304: 1.06; 4096×53248: 1.08
    (2 * 55296, Config(8192, 32, unroll=4, max_registers=32)),
    (2 * 58368, Config(8192, 32, max_registers=32)),  # 4096×57344: 1.05
    (2 * 63488, Config(8192, 32, unroll=5, backwards=True, max_registers=32)),  # 4096×61440: 1.11
    (2 * 65536, Config(16384, 32, unroll=4, max_registers=32)),  # 4096×65536: 1.05
    LONGEST,
)
FUSED_IN_PLACE = (
    *FUSED[:5],  # 65536×2048: 1.08; 104448×2560: 1.05; 87040×3072: 1.04; 74752×3584: 1.06
    (2 * 4608, Config(1024, 2, unroll=4)),  # 32768×4096: 1.07
    FUSED[5],  # 52224×5120: 1.05
    (2 * 9216, FUSED[6][1]),  # 43008×6144: 1.04; 36864×7168: 1.05; 16384×8192: 1.07
    # 25600×10240: 1.06; 21504×12288: 1.05; 16384×16384: 1.05; 14336×18432: 1.10; 12288×20480: 1.07; 10240×24576: 1.08;
    # 8192×32000: 1.05; 7168×36864: 1.04
    *FUSED[7:13],
    (2 * 47104, Config(8192, 16, unroll=5, backwards=True, max_registers=40)),  # 5120×45056: 1.09
    (2 * 58368, Config(16384, 32, max_registers=32)),  # 8192×50304: 1.07; 4096×53248: 1.08; 4096×57344: 1.08
    (2 * 63488, Config(8192, 32, unroll=5, backwards=True, max_registers=32)),  # 4096×61440: 1.14
    (2 * 65536, Config(16384, 32, max_registers=32)),  # 4096×65536: 1.08
    LONGEST,
)
# Rows that start between 16-byte boundaries take registers of their own.
FUSED_SHIFTED = (
    (2 * 1024, Config(512, 1, max_registers=56)),  # 65536×1001: 1.30, 1.35
    (2 * 2304, Config(512, 1, backwards=True, max_registers=40)),  # 65536×1501: 1.27, 1.35; 65536×2001: 1.14, 1.22
    (2 * 4096, Config(1024, 1, unroll=2, max_registers=48)),  # 32768×3001: 1.13, 1.29
    (2 * 8192, Config(1024, 4, backwards=True, max_registers=40)),  # 16384×5001: 1.15, 1.18; 16384×7001: 1.10, 1.15
    (2 * 13312, Config(1024, 4, unroll=5, backwards=True)),  # 16384×9001: 1.10, 1.12; 16384×12001: 1.11, 1.14
    (2 * 28672, Config(2048, 8, unroll=5, backwards=True)),  # 8192×20001: 1.13, 1.15; 8192×25001: 1.16, 1.18
    (2 * 36864, Config(4096, 16, unroll=5)),  # 8192×31001: 1.14, 1.31
    (2 * 45056, Config(4096, 16, unroll=6, backwards=True)),  # 8192×40001: 1.12, 1.24
    (2 * 57344, Config(4096, 16, unroll=5, max_registers=48)),  # 8192×50257: 1.19, 1.18
    (2 * 65536, Config(4096, 16, unroll=6, backwards=True)),  # 4096×62001: 1.28, 1.33
    LONGEST,
)
# The sum of x takes registers.
FUSED_SHIFTED_SMOOTHED = (
    (2 * 1024, Config(512, 1, backwards=True)),  # 65536×1001: 1.72, 1.76
    (2 * 2304, Config(512, 1, backwards=True, max_registers=48)),  # 65536×2001: 1.24, 1.30
    (2 * 4096, Config(1024, 2, backwards=True, max_registers=48)),  # 32768×3001: 1.34, 1.39
    (2 * 8192, Config(1024, 4, unroll=3, max_registers=48)),  # 16384×7001: 1.22, 1.24
    (2 * 14336, Config(1024, 4, unroll=3)),  # 16384×12001: 1.17, 1.18
    (2 * 24576, Config(2048, 8, max_registers=48)),  # 8192×20001: 1.16, 1.16
    (2 * 34816, Config(2048, 8, backwards=True)),  # 8192×31001: 1.29, 1.31
    (2 * 45056, Config(4096, 16, unroll=3, backwards=True)),  # 8192×40001: 1.23, 1.19
    (2 * 65536, Config(4096, 16, unroll=5, max_registers=56)),  # 8192×50257: 1.23, 1.25
    LONGEST,
)
FUSED_SMOOTHED = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 1.29
    (2 * 3328, Config(1024, 2, unroll=2)),  # 174080×1536: 1.14, 1.14; 87040×3072: 1.02, 1.05
    (2 * 6656, Config(2048, 4, unroll=2)),  # 32768×4096: 1.08; 43008×6144: 1.01, 1.06
    (2 * 12288, Config(2048, 4, unroll=3)),  # 16384×8192: 1.06, 1.07; 21504×12288: 1.14, 1.13
    (2 * 20480, Config(4096, 8, unroll=2, backwards=True)),  # 16384×16384: 1.03, 1.10; 12288×20480: 1.18, 1.18
    (2 * 40000, Config(4096, 16, unroll=4, max_registers=40)),  # 10240×24576: 1.14, 1.17; 8192×32000: 1.07, 1.12
    # 6144×40960: 1.26, 1.27; 8192×50304: 1.10, 1.10; 4096×57344: 1.20, 1.26; 4096×65536: 1.12, 1.13
    (2 * 65536, Config(4096, 16, unroll=4, max_registers=64)),
    LONGEST,
)
# Rows of logits and rows of soft targets, whose bytes count too; reading both and writing one takes 1.44.
FUSED_SOFT = (
    (4 * 1792, Config(512, 1)),  # 131072×512: 1.51; 65536×1000: 1.50; 178176×1500: 1.52
    (4 * 3072, Config(1024, 2, backwards=True, max_registers=48)),  # 65536×2000: 1.50; 106496×2500: 1.54
    (4 * 3840, Config(1024, 2, backwards=True)),  # 75776×3500: 1.59
    (4 * 4608, Config(1024, 4, unroll=2, max_registers=48)),  # 32768×4096: 1.48
    # 53248×5000: 1.51; 16384×6000: 1.53; 37888×7000: 1.65
    (4 * 7168, Config(2048, 4, unroll=2, max_registers=48)),
    (4 * 10240, Config(2048, 8, unroll=2, backwards=True, max_registers=48)),  # 16384×8192: 1.48; 26624×10000: 1.54
    (4 * 12800, Config(4096, 8, backwards=True, max_registers=48)),  # 8192×12000: 1.56
    (4 * 15360, Config(4096, 8, unroll=2, backwards=True, max_registers=64)),  # 18432×14000: 1.53
    (4 * 17408, Config(4096, 16, unroll=3, backwards=True, max_registers=64)),  # 8192×16384: 1.51
    (4 * 19456, Config(4096, 16, unroll=4, backwards=True, max_registers=64)),  # 14336×18000: 1.66
    # 13312×20000: 1.58; 8192×24000: 1.52; 8192×32000: 1.56; 8192×40960: 1.68
    (4 * 43008, Config(8192, 16, unroll=2, backwards=True, max_registers=64)),
    LONGEST,
)
FUSED_SOFT_SHIFTED = (
    (4 * 1280, Config(1024, 2, backwards=True, max_registers=56)),  # 65536×1001: 2.25
    (4 * 2304, Config(512, 2, backwards=True, max_registers=56)),  # 178176×1501: 1.86; 134144×2001: 1.75
    (4 * 4096, Config(2048, 4, max_registers=56)),  # 106496×2501: 2.12; 32768×3001: 1.88
    (4 * 12288, Config(1024, 4, unroll=2)),  # 53248×5001: 2.02; 16384×9001: 1.89; 21504×12001: 2.12
    (4 * 20480, Config(2048, 8, unroll=2, max_registers=56)),  # 8192×18001: 1.94
    # 11264×22001: 1.91; 8192×31001: 1.92; 6144×40001: 2.07; 8192×50257: 2.21; 4096×57345: 2.27
    (4 * 61440, Config(4096, 16, unroll=2, backwards=True, max_registers=64)),
    LONGEST,
)
# A row spread over neighbouring multiprocessors: fewer rows in flight, so that the second read finds them in L2.
SHORT_CLUSTERS = (
    (2 * 81920, Config(16384, 8, 4, unroll=2, backwards=True, max_registers=40)),  # 3072×73728: 1.18, 1.16
    (2 * 94208, Config(16384, 4, 8, unroll=5, backwards=True, max_registers=40)),  # 2979×90112: 1.22, 1.19
    (2 * 106496, Config(16384, 4, 8, unroll=3, backwards=True, max_registers=40)),  # 2048×98304: 1.20, 1.17
)
LONG_CLUSTERS = (
    # 2048×262144: 1.19, 1.20; 1170×229376: 1.21, 1.19
    (2 * 294912, Config(65536, 8, 8, unroll=2, backwards=True, max_registers=56)),
    (2 * 458752, Config(65536, 16, 8, unroll=3, backwards=True, max_registers=40)),  # 682×393216: 1.26, 1.23
    # 1024×524288: 1.22, 1.27; 512×1048576: 1.40, 1.41
    (None, Config(131072, 16, 8, unroll=2, backwards=True, max_registers=64)),
)
FUSED_CLUSTERS = (
    *SHORT_CLUSTERS,
    # 4096×128256: 1.15; 4096×151936: 1.16, 1.15; 1638×163840: 1.20, 1.16
    (2 * 200000, Config(32768, 8, 8, unroll=2, backwards=True, max_registers=40)),
    *LONG_CLUSTERS,
)
FUSED_CLUSTERS_IN_PLACE = (
    *SHORT_CLUSTERS,
    (2 * 140000, Config(32768, 8, 8, backwards=True, max_registers=40)),  # 4096×128256: 1.15
    *FUSED_CLUSTERS[3:],
)
FUSED_CLUSTERS_SHIFTED = (
    (2 * 106496, Config(8192, 4, 8, unroll=4, backwards=True, max_registers=40)),  # 3072×80001: 1.40, 1.37
    (2 * 139264, Config(16384, 8, 8, unroll=3, backwards=True, max_registers=40)),  # 2092×128257: 1.29, 1.29
    (2 * 200000, Config(16384, 8, 8, unroll=4, backwards=True, max_registers=40)),  # 1766×151937: 1.31, 1.32
    (None, Config(65536, 16, 8, unroll=4, backwards=True, max_registers=40)),  # 1023×262145: 1.50, 1.49
)
FUSED_CLUSTERS_SMOOTHED = (
    # 3072×73728: 1.24, 1.24; 2048×98304: 1.21, 1.18
    (2 * 106496, Config(16384, 4, 8, unroll=3, backwards=True, max_registers=56)),
    FUSED_CLUSTERS[3],  # 4096×128256: 1.20; 1638×163840: 1.24
    (2 * 400000, Config(65536, 8, 8, unroll=2, backwards=True, max_registers=64)),  # 2048×262144: 1.21, 1.23
    LONG_CLUSTERS[-1],
)
FUSED_CLUSTERS_SMOOTHED_IN_PLACE = (
    FUSED_CLUSTERS_SMOOTHED[0],
    (2 * 140000, Config(32768, 8, 4, unroll=3, backwards=True, max_registers=64)),  # 4096×128256: 1.17
    (2 * 200000, Config(16384, 8, 8, unroll=6, backwards=True, max_registers=40)),  # 4096×151936: 1.20
    *FUSED_CLUSTERS_SMOOTHED[2:],
)
FUSED_CLUSTERS_SOFT = (
    FUSED_SOFT[-2],
    (4 * 47104, Config(8192, 4, 8, unroll=5, backwards=True, max_registers=64)),  # 5120×45056: 1.79
    (4 * 53248, Config(8192, 4, 8, unroll=6, max_registers=64)),  # 8192×50304: 1.78
    # 4096×57344: 1.72; 4096×65536: 1.64; 3072×73728: 1.75
    (4 * 81920, Config(16384, 4, 8, unroll=3, max_registers=64)),
    (4 * 114688, Config(32768, 8, 8, unroll=2, backwards=True, max_registers=48)),  # 2979×90112: 1.90; 100352: 1.82
    (4 * 200000, Config(32768, 8, 8, unroll=3, backwards=True, max_registers=64)),  # 128256: 1.78; 151936: 1.80
    (None, Config(65536, 16, 8, unroll=2, backwards=True, max_registers=64)),  # 2048×262144: 1.95
)
FUSED_CLUSTERS_SOFT_SHIFTED = (
    FUSED_SOFT_SHIFTED[-2],
    (4 * 81920, Config(8192, 4, 8, unroll=2, backwards=True, max_registers=64)),  # 4096×65001: 2.13
    (4 * 106496, Config(16384, 4, 8, unroll=4, backwards=True, max_registers=64)),  # 2048×98305: 2.19
    (None, Config(16384, 8, 8, unroll=2, backwards=True, max_registers=64)),  # 4096×128257: 2.18; 151937: 2.22
)
# Many rows that programs share: each keeps its part in L1 for the second read, which leaves L2 to the first. None: rows
# so short are faster with a program each.
SHARED = (
    (2 * 38912, None),
    (2 * 45056, Config(2048, 4, unroll=3, backwards=True, max_registers=40, steps=3)),  # 6144×40960: 1.05, 1.07
    (2 * 53248, Config(2048, 4, unroll=2, backwards=True, max_registers=40, steps=4)),  # 8192×50304: 1.04, 1.03
    # 4096×57344: 1.06, 1.07; 4096×65536: 1.03, 1.05
    (2 * 90112, Config(2048, 4, unroll=3, backwards=True, max_registers=40, steps=3)),
    (2 * 106496, Config(2048, 4, unroll=2, backwards=True, max_registers=40, steps=4)),  # 2600×100352: 1.06, 1.04
    (2 * 139264, Config(2048, 4, unroll=2, backwards=True, max_registers=48, steps=4)),  # 4096×128256: 1.04, 1.02
    # 3400×151936: 1.03, 1.03; 2048×202048: 1.06, 1.05; 2048×262144: 1.04, 1.03
    (2 * 393216, Config(4096, 8, unroll=2, backwards=True, max_registers=40, steps=4)),
    # 1024×524288: 1.04, 1.03; 512×1048576: 1.08, 1.07
    (None, Config(8192, 16, unroll=2, backwards=True, max_registers=40, steps=4)),
)
SHARED_SMOOTHED = (
    (2 * 22528, None),
    (2 * 28672, Config(2048, 4, unroll=4, backwards=True, max_registers=48, steps=4)),  # 10240×24576: 1.06, 1.07
    # 8192×32000: 1.07, 1.05; 7168×36864: 1.05
    (2 * 38912, Config(2048, 4, unroll=2, backwards=True, max_registers=40, steps=4)),
    # 6144×40960: 1.07; 8192×50304: 1.08, 1.08; 4096×57344: 1.07; 4096×65536: 1.06
    (2 * 90112, Config(2048, 4, unroll=4, backwards=True, max_registers=48, steps=4)),
    # 2600×100352: 1.09; 4096×128256: 1.07, 1.03
    (2 * 139264, Config(2048, 4, unroll=2, backwards=True, max_registers=40, steps=4)),
    (2 * 229376, Config(4096, 8, unroll=2, backwards=True, max_registers=40, steps=4)),  # 2048×202048: 1.11
    # 2048×262144: 1.06, 1.04; 1024×524288: 1.11
    (2 * 786432, Config(4096, 8, unroll=4, backwards=True, max_registers=48, steps=4)),
    (None, Config(8192, 16, unroll=4, backwards=True, max_registers=48, steps=4)),  # 512×1048576: 1.27
)
# Smoothed, too.
SHARED_SHIFTED = (
    (2 * 28672, None),
    # 8192×31001: 1.14, 1.16; 8192×40001: 1.11; 8192×50257: 1.14, 1.14; 4096×62001: 1.13; 2092×128257: 1.12, 1.13;
    # smoothed, 8192×31001: 1.22; 8192×50257: 1.21; 4096×62001: 1.18; 2092×128257: 1.18
    (2 * 139264, Config(2048, 4, unroll=2, backwards=True, max_registers=48, steps=4)),
    # 1023×262145: 1.15, 1.15; 1023×524289: 1.16; 511×1048577: 1.19; smoothed, 1023×262145: 1.25
    (None, Config(4096, 8, unroll=2, backwards=True, max_registers=48, steps=4)),
)
SHARED_SOFT = (
    (4 * 36864, None),
    (4 * 45056, Config(2048, 4, unroll=3, backwards=True, max_registers=64, steps=3)),  # 6144×40960: 1.57
    # 8192×50304: 1.56, 1.56; 4096×65536: 1.54
    (4 * 90112, Config(2048, 4, unroll=4, backwards=True, max_registers=72, steps=4)),
    (4 * 106496, Config(4096, 8, unroll=4, backwards=True, max_registers=64, steps=4)),  # 2600×100352: 1.62
    (4 * 139264, Config(4096, 8, unroll=4, backwards=True, max_registers=56, steps=4)),  # 4096×128256: 1.63, 1.60
    # 3400×151936: 1.60; 2048×202048: 1.62; 2048×262144: 1.64
    (4 * 393216, Config(4096, 8, unroll=4, backwards=True, max_registers=64, steps=4)),
    (4 * 786432, Config(4096, 8, unroll=4, backwards=True, max_registers=72, steps=4)),  # 1024×524288: 1.66
    (None, Config(8192, 16, unroll=4, backwards=True, max_registers=64, steps=4)),  # 512×1048576: 1.97
)
SHARED_SOFT_SHIFTED = (
    (4 * 28672, None),
    # 8192×31001: 1.77; 8192×50257: 1.72; 4096×62001: 1.74; 2092×128257: 1.76
    (4 * 139264, Config(2048, 4, unroll=2, backwards=True, max_registers=64, steps=4)),
    (None, Config(4096, 8, unroll=4, backwards=True, max_registers=64, steps=4)),  # 1023×262145: 1.82
)
STATS = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 0.92
    (2 * 3072, Config(512, 2, unroll=4)),  # 65536×2048: 0.51; 87040×3072: 0.51
    (2 * 6144, Config(512, 2)),  # 32768×4096: 0.51; 52224×5120: 0.50
    (2 * 12288, Config(1024, 4)),  # 16384×8192: 0.51; 25600×10240: 0.50
    (2 * 24576, Config(2048, 8)),  # 18432×14336: 0.50; 16384×16384: 0.48; 12288×20480: 0.51
    (2 * 40000, Config(8192, 16)),  # 9216×28672: 0.53; 8192×32000: 0.49
    (2 * 81920, Config(4096, 8, unroll=4)),  # 8192×50304: 0.48; 4096×65536: 0.49
    (2 * 200000, Config(8192, 16, unroll=2)),  # 4096×128256: 0.47; 4096×151936: 0.47
    (None, Config(4096, 16, unroll=4)),  # 2048×262144: 0.47; 512×524288: 0.49
)
STATS_SHIFTED = (
    (2 * 12288, Config(1024, 1)),  # 65536×2001: 0.55; 16384×5001: 0.57; 16384×9001: 0.53
    (2 * 24576, Config(2048, 4)),  # 8192×18001: 0.53
    (2 * 40000, Config(4096, 4, unroll=4)),  # 8192×31001: 0.50
    (None, Config(2048, 8)),  # 8192×50257: 0.49; 2092×128257: 0.54
)
STATS_FEW_ROWS = ((None, Config(16384, 8, 8)),)  # 32×128256: 1.19 of a copy that stays in L2; 64×262144: 0.85
GRAD = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 1.07
    (2 * 20480, Config(2048, 2)),  # 65536×2048: 1.05; 16384×8192: 1.05
    (None, Config(1024, 1)),  # 8192×32000: 1.05; 4096×128256: 1.04
)
GRAD_SHIFTED = (
    (2 * 1024, Config(1024, 1)),  # 65536×1001: 1.13
    (2 * 4096, Config(4096, 4)),  # 89088×3001: 1.10
    (2 * 20480, Config(1024, 1)),  # 29696×9001: 1.19
    (2 * 40960, Config(2048, 2)),  # 8192×31001: 1.19
    (None, Config(1024, 1)),  # 8192×50257: 1.16
)
# Rows up to which a program takes many, in bytes.
TILED = {"stats": 2 * 1024, "fused": 2 * 512, "grad": 2 * 512}
# Of shorter rows it takes more: the elements of a step stay.
TILES = {
    "stats": (
        (2 * 128, Config(128, 2, rows=8)),  # 524288×128: 0.97; 1048576×64: 0.97
        (None, Config(1024, 1, rows=2)),  # 262144×256: 0.92; 131072×512: 0.69; 67108×1000: 0.57
    ),
    "fused": (
        (2 * 128, Config(128, 2, rows=8)),  # 524288×128: 1.52; 1048576×64: 1.53; 2097152×32: 1.64
        (None, Config(512, 1, rows=2)),  # 262144×256: 1.27; 131072×512: 1.09
    ),
    "grad": (
        (2 * 64, Config(64, 1, rows=32)),  # 1342177×50: 1.22; 1048576×64: 1.09
        (2 * 256, Config(256, 4, rows=8)),  # 671088×100: 1.63; 524288×128: 1.09; 262144×256: 1.03
        (None, Config(512, 1, rows=2)),  # 131072×512: 1.00
    ),
}
# Statistics of rows that start between 16-byte boundaries, by their classes; no more rows where they are shorter.
ROW_A_THREAD = (
    (4, Config(4, 1, rows=128, row_a_thread=True)),  # 4194304×3: 4.1, with 20 bytes of labels and results a row
    (16, Config(16, 1, rows=64, row_a_thread=True)),  # 4194304×7: 2.56; 4194304×10: 2.08
    (64, Config(64, 1, rows=32, row_a_thread=True)),  # 3195660×21: 2.19; 1342177×50: 1.79
    (128, Config(128, 1, rows=8, row_a_thread=True)),  # 894784×75: 1.96; 671088×100: 1.68
    (256, Config(256, 1, rows=4, row_a_thread=True)),  # 447392×150: 1.63; 263172×255: 1.33
)
# Classes that lie apart, by their number; fewer rows in a group leave more classes a step.
APART = {
    "stats": (
        (512, Config(8, 1, rows=256)),  # 16·512²×21: 1.3; 16·256²×150: 0.75
        (4096, Config(64, 2, rows=64)),  # 8·64²×1000: 1.2
        (None, Config(256, 4, rows=32)),  # 8·1024×32000: 1.10
    ),
    "fused": (
        (64, Config(8, 1, rows=256)),  # 16·512²×21: 2.00; in fp32, with half the rows, 1.33
        (512, Config(32, 2, rows=128)),  # 16·256²×150: 1.57
        (4096, Config(64, 2, rows=64)),  # 8·64²×1000: 2.05
        (None, Config(256, 16, rows=64)),  # 8·1024×32000: 3.31
    ),
    "grad": ((None, Config(16, 2, rows=128)),),  # 16·512²×21: 1.4; 4·769²×19: 1.67; 8·64²×1000: 1.10
}
# Where those of neighbouring rows are not read together: up to so many classes.
NARROW = (512, Config(32, 4, rows=128))  # 4·769²×19: 1.88; statistics 0.91
# Bytes of a row beyond which clusters are worth their barriers. So few rows leave multiprocessors idle, and are done
# before zeros for an exchange would be written.
LONG_ROW, FEW_ROWS = 2 * 65536, 132


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def choose(kernel: str, problem: Problem, *, in_place: bool = False) -> Config:
    """The configuration for a kernel on a problem."""
    row_bytes = problem.row_bytes
    if problem.class_stride != 1 or row_bytes <= TILED[kernel]:
        return _tile(kernel, problem)
    long = problem.clusters and row_bytes > LONG_ROW
    config = None
    if kernel == "fused":
        # A soft cap of hard labels takes longer than the memory, which neither clusters nor sharing relieves.
        bound_by_memory = problem.soft_targets or not problem.softcap
        table = _of_a_cluster(problem, in_place) if long and bound_by_memory else _of_one(problem, in_place)
        if bound_by_memory and problem.shared_rows and problem.itemsize < 8 and problem.n_rows > FEW_ROWS:
            config = _pick(_of_many(problem), row_bytes)
    elif kernel == "stats":
        table = STATS_SHIFTED if problem.shifted else STATS
        if long and problem.n_rows <= FEW_ROWS:
            table = STATS_FEW_ROWS
    else:
        table = GRAD_SHIFTED if problem.shifted else GRAD
    config = config or _pick(table, row_bytes)
    # The same bytes a step for wider elements; no more than the row; 16 bytes a thread at the least.
    block = min(config.block * 2 // problem.itemsize, max(128, power_of_two(problem.n_classes)))
    warps = max(1, min(config.num_warps, block * problem.itemsize // (32 * 16 * config.num_ctas)))
    # Wider numbers take more registers.
    max_registers = None if problem.itemsize == 8 else config.max_registers
    return replace(config, block=block, num_warps=warps, max_registers=max_registers)


type Table[Row] = tuple[tuple[int | None, Row], ...]


def _of_one(problem: Problem, in_place: bool) -> Table[Config]:
    """For rows of one program each."""
    if problem.soft_targets:
        return FUSED_SOFT_SHIFTED if problem.shifted else FUSED_SOFT
    if problem.label_smoothing:
        return FUSED_SHIFTED_SMOOTHED if problem.shifted else FUSED_SMOOTHED
    if problem.shifted:
        return FUSED_SHIFTED
    return FUSED_IN_PLACE if in_place else FUSED


def _of_a_cluster(problem: Problem, in_place: bool) -> Table[Config]:
    """For rows that are spread over multiprocessors."""
    if problem.soft_targets:
        return FUSED_CLUSTERS_SOFT_SHIFTED if problem.shifted else FUSED_CLUSTERS_SOFT
    if problem.label_smoothing:
        return FUSED_CLUSTERS_SMOOTHED_IN_PLACE if in_place else FUSED_CLUSTERS_SMOOTHED
    if problem.shifted:
        return FUSED_CLUSTERS_SHIFTED
    return FUSED_CLUSTERS_IN_PLACE if in_place else FUSED_CLUSTERS


def _of_many(problem: Problem) -> Table[Config | None]:
    """For rows that programs share, where they are long enough."""
    if problem.soft_targets:
        return SHARED_SOFT_SHIFTED if problem.shifted else SHARED_SOFT
    if problem.shifted:
        return SHARED_SHIFTED
    return SHARED_SMOOTHED if problem.label_smoothing else SHARED


def _tile(kernel: str, problem: Problem) -> Config:
    every_class = power_of_two(problem.n_classes)
    if problem.class_stride == 1:
        between_boundaries = problem.shifted or not problem.aligned
        if kernel != "grad" and problem.n_classes <= ROW_A_THREAD[-1][0] and between_boundaries:
            return replace(_pick(ROW_A_THREAD, problem.n_classes), block=every_class)
        config = _pick(TILES[kernel], problem.row_bytes)
        return replace(config, block=every_class, rows=max(1, _elements(config, problem) // every_class))
    config = _pick(APART[kernel], problem.n_classes)
    if kernel != "grad" and problem.n_classes <= NARROW[0] and not _is_wide(problem):
        config = NARROW[1]
    neighbours = power_of_two(problem.rows_inner or problem.n_rows)
    rows = min(config.rows * 2 // problem.itemsize, neighbours)
    block = min(_elements(config, problem) // rows, every_class)
    # 4 elements a thread at the least.
    return replace(config, block=block, rows=rows, num_warps=max(1, min(config.num_warps, rows * block // 128)))


def _is_wide(problem: Problem) -> bool:
    """Whether classes of neighbouring rows are read together, as the compiler sees it."""
    strides = (problem.class_stride, problem.logits_outer_stride or 0)
    return problem.aligned and problem.logits_stride == 1 and all(stride % 16 == 0 for stride in strides)


def _pick[Row](table: Table[Row], size: int) -> Row:
    return next(config for largest, config in table if largest is None or size <= largest)


def _elements(config: Config, problem: Problem) -> int:
    """Of a tile's step: the same bytes for wider elements."""
    return config.block * config.rows * 2 // problem.itemsize
