"""`python -m mpqdm_fx`: the command line, also for torchrun."""

from mpqdm_fx.cli.app import main

main()
