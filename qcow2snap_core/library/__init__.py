"""The Python library: thin classes and functions over the other rooms, and all that is public."""
