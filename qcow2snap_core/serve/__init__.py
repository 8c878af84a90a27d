"""What the nbdkit plugin needs besides the disks: its keys, export names, threads and log lines."""
