"""What `flashsparse selftest` runs: every kernel against its reference on this machine, and its rate.

`cases` says what a kernel's test is and judges it; `on_cpu` and `on_gpu` list the native and the Metal kernels,
`operands` makes what they compute with, `machine` says what they ran on. The demo and the drive's curve are the
command's.
"""
