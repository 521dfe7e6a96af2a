"""Thin layers over plans for PyTorch, transformers and JAX.

Users import them as ``slidesparse_rt.torch``, ``slidesparse_rt.transformers`` and
``slidesparse_rt.jax``.  Each imports its framework, and is imported by nothing else here.
"""
