"""Converted models in transformers: importing this module is what registers them.

::

    import slidesparse_rt.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out_dir)  # what `slidesparse convert` wrote

Not to be confused with the package ``transformers`` itself, which ``import transformers`` means.
"""

from .integrations.transformers import (
    SlideSparseConfig,
    SlideSparseQuantizer,
    runtime_config,
)

__all__ = ["SlideSparseConfig", "SlideSparseQuantizer", "runtime_config"]
