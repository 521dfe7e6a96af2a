"""Finding, loading and binding the CUDA libraries; nothing here knows about patterns."""
