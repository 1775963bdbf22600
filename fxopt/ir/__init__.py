"""The intermediate representation: programs, their operators, and what is legal when."""
