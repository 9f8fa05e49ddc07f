"""The model as a GPTModel of Megatron: what it can express, its names and its layouts; without megatron-core."""
