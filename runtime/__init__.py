"""What a long job needs on any machine: run folders, engines, checkpoints, signals, clocks and command lines."""
