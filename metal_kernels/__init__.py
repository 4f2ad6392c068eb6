"""Kernels for Apple GPUs and their references in plain MLX operators. Imports only MLX.

`sparse_ffn`: the FFN over a list of records. `select`: which neurons, and where they are. `value`: scores by copies of
gate and up. `candidates`: what a compact gate cannot exclude. `experts`: whole experts by slot. Bodies are `.metal`
files, built once by `launch`. `flashsparse.load(..., kernels="metal")` runs them, `kernels="reference"` the references,
which the native kernels are compared with too. Without a Mac the bodies are proven by tests/metal.
"""
