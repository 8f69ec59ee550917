"""A wheel with the library in it is for one platform, and for every Python 3."""

import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LibraryHook(BuildHookInterface):
    def initialize(self, version, build_data):
        package = Path(self.root, "src", "dmd_runtime")
        if version == "standard" and not list(package.glob("*dmd_capi.*")):
            raise FileNotFoundError(
                f"{package} has no libdmd_capi.so (dmd_capi.dll, libdmd_capi.dylib): copy target/release's there, "
                "made by `cargo build --release -p dmd-capi`"
            )
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
