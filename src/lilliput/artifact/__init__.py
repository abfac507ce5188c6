"""The one thing we save: a folder of tensors and a manifest. Its schema, its writer, its reader, its verifier."""
