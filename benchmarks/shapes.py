"""Named real shapes, shared by the benchmarks and the tests: rows × vocabulary."""

from typing import NamedTuple


class Shape(NamedTuple):
    """N rows of V classes."""

    name: str
    n_rows: int
    n_classes: int


GPT2, GPT2_PADDED, LLAMA2, LLAMA3, QWEN, GEMMA = 50257, 50304, 32000, 128256, 151936, 262144

SHAPES = (
    Shape("Llama 2", 8192, LLAMA2),
    Shape("GPT-2", 8192, GPT2),
    Shape("GPT-2, padded", 8192, GPT2_PADDED),
    Shape("Llama 3", 4096, LLAMA3),
    Shape("Qwen 2.5", 4096, QWEN),
    Shape("Gemma 3", 2048, GEMMA),
    Shape("8k vocabulary", 16384, 8192),
    Shape("ImageNet", 65536, 1000),
    Shape("ImageNet, small batch", 1024, 1000),
    Shape("Llama 3, small batch", 32, LLAMA3),
)
