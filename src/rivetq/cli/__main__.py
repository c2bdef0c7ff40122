"""``python -m rivetq.cli``."""

from . import main

main()
