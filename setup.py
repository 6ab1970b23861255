"""Everything that is not in pyproject.toml. Native extensions are built here, and only where a compiler is found."""

from setuptools import setup

setup()
