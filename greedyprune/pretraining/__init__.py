"""How much pre-training is enough: a monitor, its stopping rules, and the theory."""
