"""``python -m syncmask_kernels``: what is built, what serves which operator, and why."""

from syncmask_kernels import build_info

print(build_info())
