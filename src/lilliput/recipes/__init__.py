"""The recipes we ship, one YAML file each; the first line of a file says what it is for."""
