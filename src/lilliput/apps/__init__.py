"""What people touch: the command line and the HTTP server. Thin; only here is the environment read."""
