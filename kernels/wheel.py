"""Builds the operators' library into a wheel, where CLOISTER_WHEEL_KERNELS=1 asks for it.

    CLOISTER_WHEEL_KERNELS=1 pip wheel --no-build-isolation --no-deps .

The wheel is then of this machine's kind, Python and release of ExecuTorch, which must be installed
beside hatchling; every instruction set is in it, and chosen at run time. Without the variable the
wheel is for any machine, and the library is built where it is first used.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from importlib.metadata import version as release_of
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Adds the library to the files of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile it into a folder that lasts until the wheel is written."""
        if os.environ.get("CLOISTER_WHEEL_KERNELS") != "1" or version == "editable":
            return
        sys.path.insert(0, str(Path(self.root, "kernels")))
        from cloister_kernels.library import PACKAGED, Builder

        spec = importlib.util.find_spec("executorch")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError("A wheel with operators needs executorch installed, and "
                               "pip's --no-build-isolation.")
        executorch = Path(spec.submodule_search_locations[0])
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self._folder = tempfile.TemporaryDirectory()
        path = Builder(
            folder=Path(self._folder.name), executorch=executorch, release=release_of("executorch"),
            bindings=executorch / "extension" / "pybindings" / f"_portable_lib{suffix}",
            compiler=os.environ.get("CLOISTER_COMPILER", "c++")).package()
        for each in (path, path.with_suffix(".json")):
            build_data["force_include"][str(each)] = f"cloister_kernels/{PACKAGED.name}/{each.name}"
        build_data["pure_python"], build_data["infer_tag"] = False, True
