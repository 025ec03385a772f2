"""`python -m tools.benchmarks.peers`."""

from tools.benchmarks.peers.compare import main

main()
