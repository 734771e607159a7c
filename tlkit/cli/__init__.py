"""How tlkit is called: commands, options, what is printed."""
