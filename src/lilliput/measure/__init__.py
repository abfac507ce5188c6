"""A runner to numbers, with the conditions they were taken under."""
