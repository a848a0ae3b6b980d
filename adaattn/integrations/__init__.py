"""Other libraries' models on this attention. Each module imports its library only when it is asked to register."""
