"""Which samples are worth training on: the rules, and the scores they are decided by."""
