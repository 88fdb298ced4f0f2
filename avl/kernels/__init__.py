"""Inner loops that decide what recording and quantised keys cost.

Every kernel has a reference in plain torch, which runs on any device, and a compiled version for
processors, made by numba the first time it is called and kept in numba's cache on disk.
`backend_for(device)` says which of the two runs; where numba is missing, the reference does the
work and a warning says so once.

The kernels know tensors only: neither models, caches, policies nor statistics.
"""

from avl.kernels.backend import backend_for

__all__ = ["backend_for"]
