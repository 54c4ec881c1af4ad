"""Put the configurations of conf/ into the wheel, as var/conf. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Build the package with its configurations. An editable installation reads those of the checkout."""

    def run(self):
        """Copy conf/ after the modules."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("conf", Path(self.build_lib, "var", "conf"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigurations})
