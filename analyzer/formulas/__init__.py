"""What operators cost: a file a family, each registering its formulas with `cost.formula`."""
