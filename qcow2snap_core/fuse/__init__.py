"""All snapshots of an image as one tree of directories, over FUSE."""
