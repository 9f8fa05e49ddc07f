"""How queries meet the keys and values of other ranks. All exchanges give the same numbers."""
