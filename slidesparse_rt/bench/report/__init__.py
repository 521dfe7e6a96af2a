"""``slidesparse bench report``: result files as Markdown tables and plots.

``results`` reads and merges files, ``markdown`` makes tables, ``charts`` says what plots show,
``plots`` draws them (with matplotlib, the extra ``report``), ``page`` writes this repository's own
pages.
"""

from __future__ import annotations
