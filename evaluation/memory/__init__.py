"""Speed under a real limit on the memory of a process."""
