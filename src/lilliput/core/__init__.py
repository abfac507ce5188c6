"""The vocabulary every room shares: errors, the registry, the model's description, recipes."""
