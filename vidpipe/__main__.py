"""python -m vidpipe is the command line."""

from vidpipe.cli import main

main()
