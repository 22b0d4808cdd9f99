"""What a recipe asks of the result: budgets that become rules, and gates that the written model has to pass."""
