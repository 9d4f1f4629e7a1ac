"""What the packages promise each other in docs/worker-contract.md: one side writes, the other one reads."""
