"""The published figures that the cost model is compared with, as printed by their authors."""

from __future__ import annotations

K = 1024

# ZeCO (arXiv 2507.01004), H100-80G: one collective alone, 8K tokens per GPU, d = 4096, 32 heads. Milliseconds per GPUs.
COLLECTIVE_MS = {
    "all_gather": {8: 0.375, 16: 0.658, 32: 1.616, 64: 2.543, 128: 4.350, 256: 8.514},
    "all_scan": {8: 0.226, 16: 0.297, 32: 0.448, 64: 0.739, 128: 1.272, 256: 2.165},
}

# ZeCO, 1B GLA, 32K tokens per GPU: tokens per second and GPU. "no SP" runs data parallel, without a sequence group.
THROUGHPUT = {
    "LASP-1": {8: 27014, 64: 12268},
    "LASP-2": {8: 42946, 64: 37485, 128: 33327, 256: 25402},
    "ZeCO": {8: 47369, 64: 44468, 128: 43278, 256: 40967},
    "no SP": {8: 49633, 64: 48230, 128: 47848, 256: 46588},
}

# LASP-2 (arXiv 2502.07563), table 6, Linear-Llama3-1B, A100-80G, batch 1: tokens per second of all GPUs, by sequence
# length and GPUs. What is missing ran out of memory.
TABLE_6 = {
    64 * K: {16: 35507, 32: 34240, 64: 34118, 128: 33344},
    128 * K: {16: 68406, 32: 68545, 64: 67344, 128: 66811},
    256 * K: {16: 135635, 32: 132605, 64: 130215, 128: 131550},
    512 * K: {32: 250586, 64: 245353, 128: 233442},
    1024 * K: {64: 442221, 128: 416465},
    2048 * K: {128: 769030},
}
