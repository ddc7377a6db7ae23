"""``python -m distmeta`` is the command ``distmeta``."""

from distmeta.cli import main

main()
