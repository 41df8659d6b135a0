"""A GPU that is not there: what the library asks of it, and the code that it would get.

:mod:`.device` makes torch take the machine for one with a GPU, :mod:`.capture` keeps the source
that torch.compile makes for it, :mod:`.fake` runs the library on tensors without memory and records
what a device would be asked to do, :mod:`.kernels` reads the source.
"""
