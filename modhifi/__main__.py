"""`python -m modhifi`, which is what `accelerate launch -m modhifi` needs."""

from modhifi.cli.main import main

main()
