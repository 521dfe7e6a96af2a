"""Numbers of tokens for which backends choose how to multiply: arithmetic alone."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["TOKEN_BUCKETS", "token_bucket"]

#: Powers of two, and from 128 on one and a half times each: tiles are whole, so what is fastest for
#: 1024 tokens need not be for 600.
TOKEN_BUCKETS = (
    *(16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(6144, 8192, 12_288, 16_384, 24_576, 32_768),
)


def token_bucket(tokens: int) -> int:
    """The smallest of :data:`TOKEN_BUCKETS` that is not less than ``tokens``, else the largest."""
    return TOKEN_BUCKETS[min(bisect_left(TOKEN_BUCKETS, tokens), len(TOKEN_BUCKETS) - 1)]
