"""`python -m qlip_export`."""

from qlip_export.cli import main

main()
