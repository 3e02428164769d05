"""Sphinx extension: the map of the family, as a table, from the rows that its picture is drawn from.

.. code-block:: none

    ```{family-map}
    ```
"""

from results_table import Parsing

from gae_core.studies import family_map


class FamilyMap(Parsing):
    """The ``family-map`` directive."""

    def run(self):
        """Return the table."""
        self.env.note_dependency(family_map.__file__)
        return self.parse(family_map.map_table())


def setup(app):
    """Register the directive."""
    app.add_directive("family-map", FamilyMap)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
