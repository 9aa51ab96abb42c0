"""How :func:`msacore.select` works; nothing here is public."""
