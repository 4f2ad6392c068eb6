"""Kernels for Apple GPUs and their references in plain MLX operators. Imports only MLX.

This version holds the references, which `flashsparse.load(..., kernels="reference")` runs and tests compare the
native kernels with. Metal bodies join them here, each beside its reference.
"""
