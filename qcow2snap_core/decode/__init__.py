"""From bytes in the file to the guest's bytes: decompression and decryption."""
