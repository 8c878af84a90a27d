"""One image and the disks in it: from a guest offset to bytes, and whether they still hold."""
