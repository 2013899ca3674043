"""Commands of the command line, a module each: parsing and printing only."""
