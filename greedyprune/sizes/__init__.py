"""The size of each layer: budgets, what is lost at each size, and the best sizes within limits."""
