"""What an image's metadata says, read and checked: header, snapshot table, refcounts, bitmaps."""
