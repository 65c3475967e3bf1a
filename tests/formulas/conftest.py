"""The first call of an operator on meta imports its decomposition, so single examples have no deadline."""

from hypothesis import settings

settings.register_profile("formulas", deadline=None)
settings.load_profile("formulas")
