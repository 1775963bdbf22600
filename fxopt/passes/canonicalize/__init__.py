"""From the operators that export leaves to the few that every later pass reads."""
