"""The checks of ``tests/test_cuda_without_gpu.py``, each run in a process of its own.

python -m tests.cuda_without_gpu.host_time
"""
