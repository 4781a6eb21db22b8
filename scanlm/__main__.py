"""``python -m scanlm``: the command, for installations whose scripts are not on the path."""

from scanlm.cli import app

if __name__ == "__main__":
    app()
