"""Collects into one folder what ``run.sh`` needs without internet: wheels, llama.cpp's source, the product.

    benchmarks/gpu/prepare.sh BUNDLE
    benchmarks/gpu/prepare.sh BUNDLE --source llama_cpp_python-0.3.36.tar.gz

The wheels are for the Python that runs this (PYTHON names another one) and for this machine's architecture, with a
glibc of 2.31 or newer. Only the standard library, pip and git are needed.
"""

import argparse
import hashlib
import json
import lzma
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 64 << 20
"""Bytes that a bundle may have in all."""

_GLIBC = (2, 31)
_BUILD_TOOLS = ("pip", "cmake", "ninja", "scikit-build-core")
_BINDINGS_NEED = ("diskcache", "typing-extensions")
_LEFT_OUT = ("faker", "hf_xet")
"""Wheels that others name and the measurements never import: invented names for documents, and a way to download."""

_CMAKE_LEFT_OUT = re.compile(r"cmake/data/(doc/|man/|bin/(?!cmake$)|share/(?!cmake-)|share/cmake-[^/]+/Help/)")
"""What configuring and building never needs of CMake, in names inside its wheel: CTest, CPack and the manual."""

_PRODUCT = (
    "benchmarks",
    "edge_phi3",
    "tests/golden",
    "tests/data",
    "tests/support",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
_PRODUCT_LEFT_OUT = (":(exclude)edge_phi3/demo/phi-3-demo/model.safetensors", ":(exclude)benchmarks/results")

_PACKAGE_KEEPS = ("CMakeLists.txt", "LICENSE.md", "README.md", "pyproject.toml", "llama_cpp")
_LLAMA_CPP_KEEPS = (
    "CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "scripts/ui-assets.cmake", "src",
    "tools", "vendor",
)  # fmt: skip
_BACKENDS = ("ggml-cpu", "ggml-cuda")
_NEVER_BUILT = {"bench", "docs", "examples", "tests"}
_NEVER_COMPILED = {".gif", ".ipynb", ".jpeg", ".jpg", ".json", ".md", ".mp3", ".mp4", ".png", ".svg", ".wav", ".webp"}


def main() -> None:
    """Make a bundle, and say what is in it."""
    parser = argparse.ArgumentParser(
        prog="prepare.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="folder to make; what an earlier call left there is replaced")
    parser.add_argument("--source", type=Path, help="source package of llama-cpp-python; default: pip downloads it")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - it runs before anything has checked
        sys.exit("edge-phi3 needs Python 3.11 or newer; name one with PYTHON=/path/to/python3.11.")
    bundle: Path = arguments.bundle
    if bundle.exists() and any(bundle.iterdir()) and not (bundle / "bundle.json").exists():
        sys.exit(f"{bundle} exists and is no bundle; name another folder.")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=f".{bundle.name}.") as temporary:
        made = Path(temporary) / "bundle"
        made.mkdir()
        download_wheels(made / "wheels")
        package = arguments.source or _download_source(Path(temporary))
        before, after = strip_source(package, made)
        revision = archive_product(made / "edge-phi3.tar.xz")
        manifest = describe(made, revision=revision, source_files=(before, after))
        (made / "bundle.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if manifest["bytes"] > LARGEST:
            sys.exit(
                f"The bundle has {manifest['bytes'] / 2**20:.1f} MiB, more than {LARGEST >> 20}: {_sizes(manifest)}"
            )
        shutil.rmtree(bundle, ignore_errors=True)
        made.rename(bundle)
    print(f"{bundle}: {manifest['bytes'] / 2**20:.1f} MiB for CPython {manifest['python']} on {manifest['machine']}")
    print(_sizes(manifest))


def requirements() -> list[str]:
    """Return what the product needs at run time, without llama-cpp-python, and what builds that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [text for text in project["dependencies"] if not text.startswith("llama-cpp-python")]
    return [*wanted, *_BINDINGS_NEED, *_BUILD_TOOLS]


def download_wheels(folder: Path) -> None:
    """Download all wheels, in the locked versions where there are such, into `folder`."""
    machine = platform.machine()
    newest = range(_GLIBC[1], 16, -1)
    tags = [*(f"manylinux_2_{minor}_{machine}" for minor in newest), f"manylinux2014_{machine}", f"linux_{machine}"]
    platforms = [part for tag in tags for part in ("--platform", tag)]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    _pip(
        "download", "--only-binary", ":all:", "--python-version", version, *platforms, "--dest", str(folder),
        "--constraint", str(_constraints(folder.parent.parent)), *requirements(),
    )  # fmt: skip
    for wheel in folder.iterdir():
        if wheel.name.lower().startswith(tuple(f"{name}-" for name in _LEFT_OUT)):
            wheel.unlink()
        elif wheel.name.startswith("cmake-"):
            thin_wheel(wheel, _CMAKE_LEFT_OUT)


def thin_wheel(wheel: Path, left_out: re.Pattern[str]) -> None:
    """Take the files whose names match out of a wheel and its RECORD."""
    thinner = wheel.with_suffix(".thinner")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(thinner, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        for entry in source.infolist():
            if left_out.match(entry.filename):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                rows = content.decode("utf-8").splitlines(keepends=True)
                content = "".join(row for row in rows if not left_out.match(row)).encode()
            target.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    thinner.replace(wheel)


def _constraints(folder: Path) -> Path:
    """Write the lock file into `folder`, without llama-cpp-python, which has no wheel."""
    path = folder / "constraints.txt"
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("llama-cpp-python")), encoding="utf-8")
    return path


def _download_source(folder: Path) -> Path:
    locked = re.search(
        r"^llama-cpp-python==\S+", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert locked is not None
    _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), locked[0])
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        sys.exit("pip could not download; its output above says why.")


def is_needed(path: PurePosixPath) -> bool:
    """Whether building llama.cpp with its CPU and CUDA backends, llama-server and the benches needs a file.

    Args:
        path: inside the source package of llama-cpp-python.
    """
    parts = path.parts
    if parts[:2] != ("vendor", "llama.cpp"):
        return _is_under(path, _PACKAGE_KEEPS)
    inside = PurePosixPath(*parts[2:])
    if not _is_under(inside, _LLAMA_CPP_KEEPS):
        return False
    parts = inside.parts
    if parts[:2] == ("ggml", "src") and len(parts) > 3 and parts[2] not in _BACKENDS and parts[2].startswith("ggml-"):
        return False
    if parts[:2] == ("tools", "ui"):
        return len(parts) == 3 and parts[2] in {"CMakeLists.txt", "sources.cmake", "ui.cpp.in", "ui.h.in"}
    if _NEVER_BUILT.intersection(parts[:-1]):
        return False
    return inside.suffix not in _NEVER_COMPILED


def _is_under(path: PurePosixPath, kept: Iterable[str]) -> bool:
    return any(path.is_relative_to(name) for name in kept)


def strip_source(package: Path, folder: Path) -> tuple[int, int]:
    """Pack what `is_needed` of a source package, and return its bytes unpacked: before and after.

    Args:
        package: ``llama_cpp_python-<version>.tar.gz``.
        folder: where ``llama_cpp_python-<version>.tar.xz`` is written.
    """
    name = package.name.removesuffix(".tar.gz")
    before = after = 0
    with (
        tarfile.open(package) as source,
        lzma.open(folder / f"{name}.tar.xz", "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as target,
    ):
        for member in source:
            before += member.size
            if member.isfile() and is_needed(PurePosixPath(member.name).relative_to(name)):
                after += member.size
                target.addfile(member, source.extractfile(member))
    return before, after


def archive_product(path: Path) -> str:
    """Pack the product's last commit, without what the measurements do not read, and return its revision."""
    revision = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = ["git", "-C", str(ROOT), "archive", "--prefix=edge-phi3/", "HEAD", "--", *_PRODUCT, *_PRODUCT_LEFT_OUT]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    path.write_bytes(lzma.compress(packed, preset=9))
    return revision


def describe(folder: Path, *, revision: str, source_files: tuple[int, int]) -> dict[str, Any]:
    """Return what ``bundle.json`` says: for what the bundle is, and its files with sizes and digests."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    }
    return {
        "revision": revision,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "glibc": ".".join(map(str, _GLIBC)),
        "source_bytes_unpacked": {"before": source_files[0], "after": source_files[1]},
        "bytes": sum(path.stat().st_size for path in paths),
        "files": files,
    }


def _sizes(manifest: dict[str, Any]) -> str:
    largest = sorted(manifest["files"].items(), key=lambda item: -item[1]["bytes"])
    return "\n".join(f"{entry['bytes'] / 2**20:7.2f} MiB  {name}" for name, entry in largest)


if __name__ == "__main__":
    main()
