"""`python -m megatron_lite <command>`: the same as `mlite <command>`."""

from megatron_lite.cli import main

main()
