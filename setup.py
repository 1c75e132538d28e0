"""Build the native libraries beside the Python package; everything else is in pyproject.toml."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import PlatformError

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))
from native import BUILDERS, LIB, Unbuildable


class BuildLibraries(Command):
    """Build lib/libsyncmask_{cpu,cuda}.so, and lib/build.json to tell what was built or why not."""

    description = "build the native libraries"
    user_options: list[tuple[str, str, str]] = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_temp: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def run(self) -> None:
        folder = LIB if self.editable_mode else Path(str(self.build_lib), LIB)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record = {name: self.build_library(name, folder) for name in BUILDERS}
        (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_library(self, name: str, folder: Path) -> dict[str, bool | str]:
        pattern, builder = BUILDERS[name]
        sources = sorted(Path("csrc", name).glob(pattern))
        work = Path(str(self.build_temp), name).absolute()
        try:
            if not sources:
                raise Unbuildable(f"csrc/{name} has no sources")
            detail = builder(
                sources, Path("csrc", "include"), work, folder / f"libsyncmask_{name}.so"
            )
        except Unbuildable as error:
            flag = f"SYNCMASK_REQUIRE_{name.upper()}"
            if os.environ.get(flag, "0") not in ("", "0"):
                raise PlatformError(f"{flag} is set, but: {error}") from error
            print(f"syncmask_kernels: {name} library not built: {error}", file=sys.stderr)
            return {"built": False, "detail": str(error)}
        print(f"syncmask_kernels: {name} library built: {detail}", file=sys.stderr)
        return {"built": True, "detail": detail}

    def get_source_files(self) -> list[str]:
        return [str(path) for path in Path("csrc").rglob("*") if path.is_file()]

    def get_outputs(self) -> list[str]:
        folder = Path(str(self.build_lib), LIB)
        return [str(path) for path in folder.glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPython(bdist_wheel):
    """The libraries hold no Python symbol: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


build.sub_commands.append(("build_libraries", None))
setup(cmdclass={"build_libraries": BuildLibraries, "bdist_wheel": AnyPython}, distclass=Binary)
