"""Put the configurations of conf/ into the wheel, as var/conf. Everything else is in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COMMAND = re.compile(r"python (train|annotate|sample|eval|report|\$\{hydra\.job\.name\})\.py")


class BuildWithConfigurations(build_py):
    """Build the package with its configurations. An editable installation reads those of the checkout."""

    def run(self):
        """Copy conf/ after the modules."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "var", "conf")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree("conf", target)
            for file in target.rglob("*.yaml"):  # their examples and --help name the commands of a checkout
                file.write_text(re.sub(COMMAND, r"var-\1", file.read_text()))


setup(cmdclass={"build_py": BuildWithConfigurations})
