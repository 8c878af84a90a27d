"""The RAM of a saved machine: what the stream that savevm wrote has of it, and where it lies."""
