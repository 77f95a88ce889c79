"""The pure domain: what is asked of models, how answers become tables, and how tables are judged.

Knows nothing of Prefect, files, networks, clocks or torch; everything here is a function of its arguments.
"""

__version__ = "0.1.0"
