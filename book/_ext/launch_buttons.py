"""Sphinx extension: the buttons to the repository and to Colab, where ``repository.url`` in _config.yml names one.

jupyter-book derives them too, but ``html_theme_options`` of our own replace what it derived; and the theme cannot build
a page whose launch buttons have no address.
"""

from pathlib import Path

import yaml


def add(app, config):
    """Tell the theme the project's address, if there is one."""
    repository = yaml.safe_load((Path(app.confdir) / "_config.yml").read_text(encoding="utf-8"))["repository"]
    if repository["url"]:
        config.html_theme_options |= {
            "repository_url": repository["url"],
            "repository_branch": repository["branch"],
            "path_to_docs": repository["path_to_book"],
            "use_repository_button": True,
            "launch_buttons": {"colab_url": "https://colab.research.google.com"},
        }


def setup(app):
    """Register the hook."""
    app.connect("config-inited", add)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
