"""Reference arithmetic: pure functions on arrays and tensors. Modules that need torch say so in their first line."""
