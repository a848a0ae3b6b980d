"""Let models of other libraries use this attention. Each module imports its library only when it registers."""
