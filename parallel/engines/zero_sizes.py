"""Sizes of DeepSpeed's buffers, in elements: the engine sets them and the memory model counts them."""

BUCKET_ELEMENTS = 2**26  # gradients summed at once: 256 MiB in fp32
PERSISTENT_ELEMENTS = 100_000  # stage 3 leaves parameters up to this size whole
LIVE_ELEMENTS = 10**9  # and keeps at most so many of the others whole, if they are needed again soon
