"""Before the first step: what a run will cost, and whether it computes the right numbers on this device."""
