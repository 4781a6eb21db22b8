"""``python -m scanlm`` is the command ``scanlm``."""

from scanlm.cli import app

app()
