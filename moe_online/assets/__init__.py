"""The trained checkpoint that ships with the library, and the script that trains it."""
