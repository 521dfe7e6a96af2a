"""``slidesparse bench report``: result files as Markdown tables and plots.

``results`` reads and merges files; ``markdown`` makes tables, ``passes`` and ``accuracy`` those of
whole models; ``charts`` says what plots show; ``plots`` and ``model_plots`` draw them (with
matplotlib, the extra ``report``) in the style of ``looks``; ``page`` writes this repository's own
pages.
"""

from __future__ import annotations
