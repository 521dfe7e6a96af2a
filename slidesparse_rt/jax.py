"""Sparse products on JAX arrays, also within ``jax.jit``; importing this module imports JAX.

::

    import slidesparse_rt.jax

    y = jax.jit(lambda x: slidesparse_rt.jax.sparse_matmul(x, plan))(x)

Not to be confused with JAX's own ``jax``, which ``import jax`` always means.
"""

from .integrations.jax import sparse_matmul

__all__ = ["sparse_matmul"]
