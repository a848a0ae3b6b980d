"""Use the operating system safely: files that appear whole, signals, child processes."""
