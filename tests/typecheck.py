"""The checker of shapes and types at run time, in the tests only."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is a float, as for static checkers."""
