"""``python -m groupdetr_fast`` is the command ``groupdetr``."""

from .cli import main

main()
